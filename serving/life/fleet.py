"""The models of one worker: champion, challenger and shadow, each loaded, followed and given its requests."""

import logging
import random
import threading
from collections.abc import Mapping
from typing import Any, Protocol

from features.errors import InputError
from serving.api.requests import RankRequest
from serving.life.asks import require_alike
from serving.life.following import Before, Followed, Told
from serving.life.opening import Opener
from serving.life.shadow import Counts, Log, Shadow
from serving.life.shares import require_key, takes_part
from serving.ranking.engine import RankingEngine
from serving.settings import ServeSettings
from serving.trace import Role, Trace

_LAST_SECONDS = 5.0  # for a version that is being loaded when the service ends
_log = logging.getLogger("bentoml.masknet")


class Watch(Told, Counts, Protocol):
    """The metrics, as far as models are concerned."""


class Fleet:
    """Which engine answers a request. A request reads its engine once, so that a change of version mixes nothing.

    Args:
        settings: the service's.
        worker_index: of this process among the service's, from 1.
        watch: told of models, changes and what the shadow scores, or None.
        log: where the shadow's scores go, or None.
        before: told of every champion before it answers; with InputError it is refused.
    """

    def __init__(
        self,
        settings: ServeSettings,
        worker_index: int,
        watch: Watch | None = None,
        log: Log | None = None,
        before: Before = lambda engine: None,
    ) -> None:
        self._settings, self._watch, self._log, self._before = settings, watch, log, before
        self._stopped = threading.Event()
        self._name = f"masknet follow {worker_index}"
        self._thread: threading.Thread | None = None
        self._champion: Followed | None = None
        self._challenger: Followed | None = None
        self._shadowed: Followed | None = None
        self._shadow: Shadow | None = None
        self._ready = False

    @property
    def ready(self) -> bool:
        """Whether every model is loaded, checked and warm."""
        return self._ready

    @property
    def champion(self) -> RankingEngine:
        """What answers now where no challenger does."""
        assert self._champion is not None, "start the fleet first"
        return self._champion.engine

    def start(self) -> None:
        """Load all models, then follow the registry in a thread.

        Raises:
            InputError: a model is not there, or damaged.
        """
        settings, opener = self._settings, Opener(self._settings)
        any_schema = settings.follow.compatible_schemas
        self._champion = Followed("champion", settings.model, opener, any_schema, self._watch, self._before)
        if settings.challenger:
            self._challenger = self._beside("challenger", settings.challenger.model, opener)
        if settings.shadow:
            self._shadowed = self._beside("shadow", settings.shadow.model, opener)
            self._shadow = Shadow(self._shadow_engine, settings.shadow.share, self._watch, self._log)
            self._shadow.start()
        self._ready = True
        if not all(followed.is_settled for followed in self._followed()):
            self._thread = threading.Thread(target=self._follow, name=self._name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Not ready any more, and nothing is followed; engines still answer what is in flight."""
        self._ready = False
        self._stopped.set()
        if self._shadow:
            self._shadow.stop()
        if self._thread:
            self._thread.join(_LAST_SECONDS)  # torch aborts a process that ends while a thread is inside of it

    def choose(self, context: Mapping[str, Any]) -> tuple[RankingEngine, Role]:
        """The engine that ranks for this user."""
        champion, challenger, split = self.champion, self._challenger, self._settings.challenger
        if challenger and split and takes_part(context, split.key, split.share):
            engine = challenger.engine
            if self._suits(challenger):
                return engine, "challenger"
        return champion, "champion"

    def after(self, request: RankRequest, trace: Trace) -> None:
        """Let the shadow have a request that was answered; returns at once."""
        if self._shadow:
            self._shadow.offer(request, trace)

    def about(self) -> dict[str, Any]:
        """For GET /model: source, refused or postponed version, and the same of challenger and shadow, if any."""
        found: dict[str, Any] = {}
        for followed in self._followed():
            about = followed.about()
            if followed.role == "champion":
                found |= {name: about[name] for name in ("source", "refused", "postponed")}
            else:
                found[followed.role] = about
        return found

    def look(self) -> None:
        """Ask the registry once for all models, and change to what it says."""
        assert self._champion is not None
        changed = self._champion.look()
        for followed in (self._challenger, self._shadowed):
            if followed:
                if changed:
                    followed.forget_refusal()
                followed.look(self._champion.asks)

    def _follow(self) -> None:
        wait = 0.0  # the first look is at once: workers start from the cache
        while not self._stopped.wait(wait):
            try:
                self.look()
            except Exception:  # nothing that happens here may end the following
                _log.exception("looking for new versions failed")
            if all(followed.is_settled for followed in self._followed()):
                return
            # not all workers and machines at the same moment
            wait = self._settings.follow.interval_seconds * random.uniform(0.9, 1.1)

    def _followed(self) -> list[Followed]:
        return [followed for followed in (self._champion, self._challenger, self._shadowed) if followed]

    def _beside(self, role: Role, model: str, opener: Opener) -> Followed:
        followed = Followed(role, model, opener, False, self._watch)
        assert self._champion is not None
        try:
            require_alike(role, model, self._champion.asks, followed.asks)
            if role == "challenger" and self._settings.challenger:
                require_key(self.champion.schema, self._settings.challenger.key)
        except InputError as error:
            # It did at the start of the service, and the champion has changed since: no reason to leave it unserved.
            _log.error("%s; only the champion answers", error)
        return followed

    def _shadow_engine(self) -> RankingEngine | None:
        assert self._shadowed is not None
        return self._shadowed.engine if self._suits(self._shadowed) else None

    def _suits(self, other: Followed) -> bool:
        """Whether requests that were checked for the champion suit the other: not always, after a change of schema."""
        assert self._champion is not None
        return self._champion.asks == other.asks
