"""What the routes are made of: models, and what counts, logs and completes requests. serving.service wires them."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from features.columns import Rows
from features.schema import Schema
from serving.api.admission import Admission
from serving.api.bodies import Room
from serving.api.requests import RankRequest
from serving.bundle import Bundle
from serving.calibration import ScoreN
from serving.ranking.engine import Ranked
from serving.settings import ServeSettings
from serving.trace import Role, Trace


class Engine(Protocol):
    """A model that ranks and scores (serving.ranking.engine)."""

    bundle: Bundle
    version: str

    @property
    def name(self) -> str: ...

    @property
    def schema(self) -> Schema: ...

    def rank(
        self,
        context: Mapping[str, Any],
        candidates: Rows,
        top_k: int,
        time: datetime | None = None,
        trace: Trace | None = None,
    ) -> list[Ranked]: ...

    def predict(self, rows: Rows, trace: Trace | None = None) -> ScoreN: ...

    def about(self) -> dict[str, Any]: ...


class Models(Protocol):
    """Which model answers (serving.life.fleet)."""

    @property
    def ready(self) -> bool: ...

    @property
    def champion(self) -> Engine: ...

    def choose(self, context: Mapping[str, Any]) -> tuple[Engine, Role]: ...

    def after(self, request: RankRequest, trace: Trace) -> None: ...

    def about(self) -> dict[str, Any]: ...


class Observer(Protocol):
    """Counts (serving.monitoring.metrics)."""

    def answered(self, trace: Trace) -> None: ...

    def refused(self, route: str, status: int, code: str) -> None: ...

    def queue(self, depth: int) -> None: ...


class Log(Protocol):
    """Keeps a sample of requests (serving.monitoring.log)."""

    def offer(self, trace: Trace) -> None: ...


class Filler(Protocol):
    """Fetches what a request leaves out (serving.store.fill)."""

    def fill(self, context: dict[str, Any], columns: MutableMapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass
class Parts:
    """Everything that a request meets. `draining` is set once the process has been told to end."""

    fleet: Models
    settings: ServeSettings
    watch: Observer
    log: Log | None = None
    filler: Filler | None = None
    draining: bool = False
    protected: bool = False  # whether clients need a token

    def __post_init__(self) -> None:
        self.admission = Admission(self.settings.limits, self.watch.queue)
        self.room = Room(self.settings.limits)

    @property
    def ready(self) -> bool:
        """Whether new requests may be sent here."""
        return self.fleet.ready and not self.draining

    @property
    def optional(self) -> tuple[str, ...]:
        """Fields that requests may leave out."""
        return self.settings.store.fields if self.filler and self.settings.store else ()
