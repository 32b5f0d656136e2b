"""What the routes are made of where there is no service around them: one model, and nobody who counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serving.api.parts import Engine, Parts
from serving.api.requests import RankRequest
from serving.settings import ServeSettings
from serving.trace import Role, Trace


class Unwatched:
    """Counts nothing."""

    def answered(self, trace: Trace) -> None:
        pass

    def refused(self, route: str, status: int, code: str) -> None:
        pass

    def queue(self, depth: int) -> None:
        pass


@dataclass(frozen=True)
class OneModel:
    """A single model that never changes."""

    champion: Engine
    ready: bool = True

    def choose(self, context: Mapping[str, Any]) -> tuple[Engine, Role]:
        return self.champion, "champion"

    def after(self, request: RankRequest, trace: Trace) -> None:
        pass

    def about(self) -> dict[str, Any]:
        return {}


def parts_of(engine: Engine, settings: ServeSettings | None = None, **more: Any) -> Parts:
    """Parts around one engine; more of them by their names."""
    return Parts(OneModel(engine), settings or ServeSettings(), Unwatched(), **more)
