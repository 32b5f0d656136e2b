"""From MODEL to an engine that answers: found, copied, checked, loaded and warm."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from features.errors import InputError, one_line
from serving.life.cache import ModelCache, default_folder
from serving.life.cores import usable_cores
from serving.life.using import use_folder
from serving.models import (
    NotNow,
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
        """What MODEL means now; if MLflow is away, or that version is bad or not to be had, what it last meant.

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
        except NotNow as error:
            return self._fall_back(model, error.details, None, tell)
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
            except (NotNow, InputError) as error:
                tell(str(error))
        return self.open_by_registry(model, tell)

    def open(self, found: Registered) -> RankingEngine:
        """The engine of a registered version, from its copy, which is made if need be.

        A copy that is damaged is made anew once. While the engine lives, nobody removes the copy as old.

        Raises:
            BadVersion: its digests, golden rows or shape are wrong, or the settings cannot be had with it.
            RegistryAway: it is not here, and MLflow does not answer.
            NotNow: a disk, or the way here, is at fault.
        """
        try:
            return self._open_copy(found)
        except NotRegistered as error:
            _log.warning("%s", error)
            raise BadVersion(f"the files of {found.uri} are not in the registry", found) from None
        except (InputError, OSError) as error:
            if (cause := _by_system(error)) is not None:
                raise NotNow(f"{found.uri} cannot be copied or read: {cause.strerror}", one_line(error)) from None
            if isinstance(error, OSError):
                raise
            # GET /model tells of this, without paths
            raise BadVersion(str(error).replace(str(self.cache.path(found)), found.uri), found) from None

    def _open_copy(self, found: Registered, again: bool = False) -> RankingEngine:
        with self.cache.reading(found) as path:
            try:
                engine = self._load(path, found.version)
            except InputError as error:
                # Of the very bytes that were read: nobody changes them within this block.
                if again or _by_system(error) is not None or not self.cache.is_damaged(found):
                    raise
            else:
                use_folder(path, engine)
                return engine
        self.cache.discard_damaged(found)
        return self._open_copy(found, again=True)

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
        except NotNow as error:
            raise InputError(f"model {model!r}: {reason}, and {error.details}") from None
        tell(f"{reason}; {model} is served from the cache, as {known.uri}")
        return Opened(engine, known, "cache")


def _by_system(error: BaseException | None) -> OSError | None:
    """What the system said of a disk or a network, where that is behind an error. A file that a bundle lacks is not."""
    if isinstance(error, InputError):
        error = error.__context__
        if isinstance(error, FileNotFoundError):
            return None
    return error if isinstance(error, OSError) and error.errno else None
