"""A model that is served, kept at what the registry says it is."""

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from features.errors import InputError, one_line
from serving.life.asks import Asks, asks_of, difference
from serving.life.opening import Opened, Opener, Source
from serving.life.postponed import Postponed
from serving.models import NotNow, Registered, RegistryAway, find_registered, is_alias
from serving.ranking.engine import RankingEngine
from serving.trace import Role

_log = logging.getLogger("bentoml.masknet")

Before = Callable[[RankingEngine], None]


class Told(Protocol):
    """Who counts what happens to models: the metrics."""

    def model(self, name: str, version: str, role: Role) -> None:
        """A role has this model from now on."""

    def swap(self, outcome: str) -> None:
        """One more change of model: done, refused, postponed, or unreachable, when MLflow cannot be asked for one."""


class Followed:
    """What answers in a role. `look` brings it up to date; whoever reads `engine` once has one version throughout.

    Args:
        role: champion, challenger or shadow.
        model: MODEL as the settings have it.
        opener: opens its versions.
        any_schema: take a version that asks clients for other fields than the present one.
        told: what counts the changes, or None.
        before: told of every engine before it answers; with InputError it is refused.
        clock: in seconds.
    """

    def __init__(
        self,
        role: Role,
        model: str,
        opener: Opener,
        any_schema: bool,
        told: Told | None,
        before: Before = lambda engine: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.role, self.model = role, model
        self._opener, self._any_schema, self._told = opener, any_schema, told
        self._before, self._clock = before, clock
        self._refused: tuple[Registered | None, str] | None = None
        self._postponed: Postponed | None = None
        self._away = ""
        opened = opener.open_by_cache(model, _log.warning)
        before(opened.engine)
        self._take(opened)

    engine: RankingEngine
    asks: Asks
    source: Source

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing to look for: a folder, or a fixed version that MLflow has confirmed.

        One that is to be tried again, since its copy in the cache was that of a registry before, is not yet.
        """
        if self._found is None:
            return True
        return self.source == "registry" and not is_alias(self.model) and self._postponed is None

    def about(self) -> dict[str, Any]:
        """For people: which version, from where, and which one was refused, or is tried again, and why."""
        engine, refused, late = self.engine, self._refused, self._postponed
        return {
            "name": engine.name,
            "version": engine.version,
            "source": self.source,
            "refused": refused and {"version": refused[0] and refused[0].version, "reason": refused[1]},
            "postponed": late and late.about(),
        }

    def look(self, champion: Asks | None = None) -> bool:
        """Ask the registry, and change to another version if it says so and the version is good; whether it was done.

        A version that was refused is looked at again when MODEL has stood for another meanwhile, or when its tag has
        changed; one that could not be had, as on a full disk, after a pause that grows. MLflow being away changes
        nothing, but that the source is the cache.

        Args:
            champion: what clients send, which a new version must suit; by default what the present one asks for.
        """
        if self.is_settled:
            return False
        try:
            found = find_registered(self.model)
            self._reached()
            if self._found is not None and found.identity == self._found.identity:
                self._refused = self._postponed = None
                return False
            if self._is_known(found):
                return False
            return self._change_to(found, champion or self.asks)
        except RegistryAway as error:
            self._unreachable(str(error))
        except InputError as error:  # the registry does not have it any more
            self._reached()
            self._refuse(None, f"{self.model} is not in the registry", one_line(error))
        return False

    def forget_refusal(self) -> None:
        """Look again at what was refused, since what it did not suit has changed."""
        self._refused = None

    def _is_known(self, found: Registered) -> bool:
        """Whether it was refused, or it is too early to try it again."""
        if self._refused is not None and self._refused[0] == found:
            return True
        late = self._postponed
        return late is not None and late.found == found and self._clock() < late.since + late.pause

    def _change_to(self, found: Registered, suits: Asks) -> bool:
        details = ""
        try:
            engine = self._opener.open(found)
            changed = None if self._any_schema or found.compatible else difference(suits, asks_of(engine.schema))
            reason = changed and f"its clients would have to change: {changed}"
            if reason is None and (details := self._unsuited(engine)):
                reason = "the service's settings do not suit it"
        except RegistryAway:
            raise
        except NotNow as error:
            self._postpone(found, error)
            return False
        except InputError as error:
            reason = one_line(error)
        except Exception as error:  # whatever is wrong with a new version, the old one goes on
            _log.exception("%s cannot be loaded", found.uri)
            reason = f"it cannot be loaded: {type(error).__name__}"
        if reason is not None:
            self._refuse(found, reason, details)
            return False
        before = self.engine.version
        self._take(Opened(engine, found, "registry"))
        self._opener.cache.remember(self.model, found)
        _log.info("%s: version %s replaces version %s", self.model, found.version, before)
        if self._told:
            self._told.swap("done")
        return True

    def _unsuited(self, engine: RankingEngine) -> str:
        """What `before` has against it."""
        try:
            self._before(engine)
        except InputError as error:
            return one_line(error)
        return ""

    def _take(self, opened: Opened) -> None:
        self._found, self.source = opened.found, opened.source
        self.asks = asks_of(opened.engine.schema)
        self.engine = opened.engine
        self._refused = self._postponed = None
        if self._told:
            self._told.model(self.engine.name, self.engine.version, self.role)

    def _refuse(self, found: Registered | None, reason: str, details: str = "") -> None:
        """`reason` is for everybody, and `details` instead of it for the log."""
        if self._refused == (found, reason):
            return
        self._refused, self._postponed = (found, reason), None
        what = found.uri if found else self.model
        _log.error("%s is refused, version %s goes on: %s", what, self.engine.version, details or reason)
        if self._told:
            self._told.swap("refused")

    def _postpone(self, found: Registered, error: NotNow) -> None:
        self._postponed = late = Postponed.after(self._postponed, found, str(error), self._clock())
        self._refused = None
        what, now = f"{found.uri} is tried again in {late.pause:.0f} s", self.engine.version
        _log.error("%s, version %s goes on: %s", what, now, error.details)
        if self._told:
            self._told.swap("postponed")

    def _reached(self) -> None:
        if self._away:
            _log.warning("MLflow answers again")
        self._away, self.source = "", "registry"

    def _unreachable(self, reason: str) -> None:
        if not self._away:
            _log.warning("%s: MLflow does not answer, version %s goes on: %s", self.model, self.engine.version, reason)
        self._away, self.source = reason, "cache"
        if self._told:
            self._told.swap("unreachable")
