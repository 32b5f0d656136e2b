"""Copies of registered models on this machine: what a start without MLflow serves, and a swap back loads.

CACHE/<registry>/@<model>.json              the version that a MODEL, such as an alias, last stood for and that was good
CACHE/<registry>/NAME/VERSION-<identity>/   a version's bundle, whole and with its digests checked

<registry> is a hash of MLflow's address: stores number their versions alike. Everything appears by a rename. What was
not used lately is removed, unless a process uses it.
"""

import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

import orjson

from features.errors import InputError
from features.files import file_written_whole, folder_written_whole, remove_folder
from serving.life.cores import lower_priority
from serving.life.downloads import Download, download_whole
from serving.life.using import newest_first, remove_old, use_folder
from serving.manifest import verified_manifest
from serving.models import Registered

KEEP = 5  # newest versions of a model, beside those in use and those that its last MODELs, as many, stand for
REGISTRIES = 5  # that were used last, beside those in use
_REGISTRY = re.compile(r"[0-9a-f]{12}")
_LOCAL = "sqlite:///"
_log = logging.getLogger("bentoml.masknet")


def default_folder() -> Path:
    """~/.cache/masknet, or where XDG_CACHE_HOME says."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "masknet"


class ModelCache:
    """The copies from one registry. Several processes may use it at the same time.

    While there is one, nobody removes the registry's folder.

    Args:
        folder: of all registries; made where it is missing.
        registry: MLflow's address; a password in it is of no consequence.
        download: copies a version's files into a folder and returns the path of the bundle among them.
    """

    def __init__(self, folder: Path, registry: str, download: Download) -> None:
        self.folder, self._download = folder / _name_of(registry), download
        try:
            use_folder(self.folder, self)
            os.utime(self.folder)
        except OSError as error:
            raise InputError(f"cache {folder} cannot be made: {error.strerror}; choose another: --set cache=") from None

    def path(self, found: Registered) -> Path:
        """Where a version's bundle is, or would be."""
        return self._models(found.name) / f"{found.version}-{found.identity}"

    def get(self, found: Registered) -> Path:
        """A version's bundle, downloaded unless it is here; of several processes one downloads and the others wait.

        Raises:
            InputError: what was downloaded is no bundle, or a byte of it is not as its digest says; nothing is kept.
            NotNow: MLflow does not answer, or what was downloaded has other bytes each time.
            OSError: the disk is full, or will not be written to.
        """
        target = self.path(found)
        with self._alone(found.name):
            if target.is_dir():
                _touch(target)
            else:
                # Copying and hashing gigabytes gives way to requests.
                with ThreadPoolExecutor(1, initializer=lower_priority) as aside:
                    aside.submit(self._fill, found, target).result()
                self._prune(found)
                self._prune_registries()
        return target

    @contextmanager
    def reading(self, found: Registered) -> Iterator[Path]:
        """A version's bundle, as by `get`, that nobody replaces or removes for the length of the block."""
        path = self.path(found)
        while True:
            with self._alone(found.name, fcntl.LOCK_SH):  # first: `get` waits for all who read, as long as they load
                if path.is_dir():
                    _touch(path)
                    yield path
                    return
            self.get(found)  # which may be removed again before it is locked

    def is_damaged(self, found: Registered) -> bool:
        """Whether there is a copy that is not as its digests say."""
        path = self.path(found)
        if not path.is_dir():
            return False
        try:
            verified_manifest(path)
        except InputError:
            return True
        return False

    def discard_damaged(self, found: Registered) -> None:
        """Remove a copy that is damaged, so that `get` downloads it, once nobody reads it; one made anew stays."""
        with self._alone(found.name):
            if self.is_damaged(found):
                remove_folder(self.path(found))

    def remember(self, model: str, found: Registered) -> None:
        """The version that MODEL stands for, which was found to be good; where it cannot be written, that is told."""
        try:
            with self._alone(found.name), file_written_whole(self._memory(model)) as file:
                file.write_bytes(orjson.dumps(asdict(found)))
        except OSError as error:
            _log.warning("%s: a start without MLflow will not know of %s: %s", model, found.uri, error.strerror)

    def remembered(self, model: str) -> Registered | None:
        """The version that MODEL last stood for, if its copy is here."""
        memory = self._memory(model)
        found = _read(memory)
        if found is None or not self.path(found).is_dir():
            return None
        _touch(memory)
        return found

    def _fill(self, found: Registered, target: Path) -> None:
        with folder_written_whole(target) as folder:
            for path in download_whole(found, folder / ".download", self._download).iterdir():
                path.rename(folder / path.name)
            shutil.rmtree(folder / ".download")

    def _prune(self, new: Registered) -> None:
        """Leave the newest versions, those that MODELs stand for now, and those in use; the lock is held."""
        files = newest_first(self.folder.glob("@*.json"))
        memories = [(file, found) for file in files if (found := _read(file)) is not None and found.name == new.name]
        wanted = {self.path(found) for _, found in memories[:KEEP]} | {self.path(new)}
        others = [path for path in self._models(new.name).iterdir() if path.is_dir() and path not in wanted]
        partial = [path for path in others if path.name.startswith(".")]  # of processes that were killed
        for path in partial:
            shutil.rmtree(path, ignore_errors=True)
        remove_old([path for path in others if path not in partial], KEEP - 1)
        for file, found in memories[KEEP:]:
            if not self.path(found).is_dir():
                file.unlink(missing_ok=True)

    def _prune_registries(self) -> None:
        """Leave this one, those that were used last, and those in use."""
        for left in self.folder.parent.glob(".*.removed-*"):  # by processes that were killed
            shutil.rmtree(left, ignore_errors=True)
        others = [path for path in self.folder.parent.iterdir() if _REGISTRY.fullmatch(path.name)]
        remove_old([path for path in others if path != self.folder], REGISTRIES - 1)

    @contextmanager
    def _alone(self, name: str, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
        """One process and thread at a time for a model, or several that read; a lock that a dead process drops."""
        folder = self._models(name)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, kind)
            yield

    def _models(self, name: str) -> Path:
        return self.folder / _file_name(name)

    def _memory(self, model: str) -> Path:
        return self.folder / f"@{_file_name(model)}.json"


def _touch(path: Path) -> None:
    """It is used; where the time of that cannot be written, as in another user's cache, it counts as older."""
    with suppress(OSError):
        os.utime(path)


def _read(memory: Path) -> Registered | None:
    """None also for a file of another program version or a broken disk: MLflow knows better."""
    try:
        return Registered(**orjson.loads(memory.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _name_of(registry: str) -> str:
    if registry.startswith(_LOCAL):
        registry = _LOCAL + str(Path(registry.removeprefix(_LOCAL)).absolute())
    return sha256(re.sub(r"(?<=://)[^/]*@", "", registry).encode()).hexdigest()[:12]


def _file_name(text: str) -> str:
    quoted = quote(text, safe=" ")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted
