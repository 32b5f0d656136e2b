"""From MODEL to an engine that answers: found, copied, checked, loaded and warm."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from features.errors import InputError
from serving.life.cache import ModelCache, default_folder
from serving.life.cores import lower_priority, usable_cores
from serving.models import (
    NotRegistered,
    Registered,
    RegistryAway,
    download,
    find_registered,
    is_registered,
    registry_uri,
)
from serving.ranking.engine import RankingEngine
from serving.settings import ServeSettings

Source = Literal["folder", "registry", "cache"]
Tell = Callable[[str], None]
_log = logging.getLogger("bentoml.masknet")


class BadVersion(InputError):
    """A registered version that is no good."""

    def __init__(self, message: str, found: Registered) -> None:
        super().__init__(message)
        self.found = found


@dataclass(frozen=True)
class Opened:
    """An engine, the registered version that it is (None for a folder), and where that was learned."""

    engine: RankingEngine
    found: Registered | None
    source: Source


class Opener:
    """Opens models as the settings say. Needs MLflow for registered ones alone.

    Args:
        settings: the service's. Where they leave out the threads an engine gets the worker's share of the cores.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._threads = settings.threads or max(1, usable_cores() // settings.workers)

    @cached_property
    def cache(self) -> ModelCache:
        """The copies of this registry's models."""
        return ModelCache(self._settings.cache or default_folder(), registry_uri(), download)

    def open_by_registry(self, model: str, tell: Tell) -> Opened:
        """What MODEL means now; if MLflow is away, or that version is bad, what it last meant and was good.

        Raises:
            InputError: there is no such model, or it is damaged and there is no good copy of an earlier version.
        """
        if not is_registered(model):
            return Opened(self._load(Path(model), None), None, "folder")
        try:
            found = find_registered(model)
            engine = self.open(found)
        except RegistryAway as error:
            return self._fall_back(model, f"MLflow at {registry_uri()} does not answer ({error})", None, tell)
        except BadVersion as bad:
            return self._fall_back(model, str(bad), bad.found, tell)
        self.cache.remember(model, found)
        return Opened(engine, found, "registry")

    def open_by_cache(self, model: str, tell: Tell) -> Opened:
        """What MODEL last meant and was good, without asking MLflow; if there is none, as `open_by_registry`."""
        known = self.cache.remembered(model) if is_registered(model) else None
        if known is not None:
            try:
                return Opened(self.open(known), known, "cache")
            except (RegistryAway, InputError) as error:
                tell(str(error))
        return self.open_by_registry(model, tell)

    def open(self, found: Registered) -> RankingEngine:
        """The engine of a registered version, from its copy, which is made if need be.

        A copy that is damaged is made anew once.

        Raises:
            BadVersion: its digests, golden rows or shape are wrong, or the settings cannot be had with it.
            RegistryAway: it is not here, and MLflow does not answer.
        """
        try:
            try:
                return self._open_copy(found)
            except InputError:
                if not self.cache.is_damaged(found):
                    raise
                self.cache.discard(found)
                return self._open_copy(found)
        except NotRegistered as error:
            _log.warning("%s", error)
            raise BadVersion(f"the files of {found.uri} are not in the registry", found) from None
        except InputError as error:
            # GET /model tells of this, without paths
            raise BadVersion(str(error).replace(str(self.cache.path(found)), found.uri), found) from None

    def _open_copy(self, found: Registered) -> RankingEngine:
        # Copying and hashing gigabytes gives way to requests. Loading does not: threads that a backend starts then
        # would keep the low priority for good.
        with ThreadPoolExecutor(1, initializer=lower_priority) as aside:
            path = aside.submit(self.cache.get, found).result()
        return self._load(path, found.version)

    def _load(self, path: Path, version: str | None) -> RankingEngine:
        settings = self._settings
        return RankingEngine.load(
            path,
            version,
            backend=settings.backend,
            tables=settings.tables,
            device=settings.device,
            threads=self._threads,
        )

    def _fall_back(self, model: str, reason: str, bad: Registered | None, tell: Tell) -> Opened:
        known = self.cache.remembered(model)
        if known is None or known == bad:
            raise InputError(f"model {model!r}: {reason}, and there is no earlier copy in {self.cache.folder}")
        try:
            engine = self.open(known)
        except RegistryAway:
            raise InputError(f"model {model!r}: {reason}, and the copy of {known.uri} is damaged") from None
        tell(f"{reason}; {model} is served from the cache, as {known.uri}")
        return Opened(engine, known, "cache")
