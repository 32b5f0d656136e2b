"""Copies of registered models on this machine: what a start without MLflow serves, and a swap back loads.

CACHE/<registry>/@<model>.json              the version that a MODEL, such as an alias, last stood for and that was good
CACHE/<registry>/NAME/VERSION-<identity>/   a version's bundle, whole and with its digests checked

<registry> is a hash of MLflow's address: stores number their versions alike. Everything appears by a rename.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

import orjson

from features.errors import InputError
from features.files import file_written_whole, folder_written_whole
from serving.manifest import verified_manifest
from serving.models import Registered

KEEP = 5  # newest versions of a model, beside those that a MODEL stands for
_LOCAL = "sqlite:///"

Download = Callable[[Registered, Path], Path]


def default_folder() -> Path:
    """~/.cache/masknet, or where XDG_CACHE_HOME says."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "masknet"


class ModelCache:
    """The copies from one registry. Several processes may use it at the same time.

    Args:
        folder: of all registries; made where it is missing.
        registry: MLflow's address; a password in it is of no consequence.
        download: copies a version's files into a folder and returns the path of the bundle among them.
    """

    def __init__(self, folder: Path, registry: str, download: Download) -> None:
        self.folder, self._download = folder / _name_of(registry), download
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cache {folder} cannot be made: {error.strerror}; choose another: --set cache=") from None

    def path(self, found: Registered) -> Path:
        """Where a version's bundle is, or would be."""
        return self._models(found.name) / f"{found.version}-{found.identity}"

    def get(self, found: Registered) -> Path:
        """A version's bundle, downloaded unless it is here; of several processes one downloads and the others wait.

        Raises:
            InputError: what was downloaded is no bundle, or a byte of it is not as its digest says; nothing is kept.
            RegistryAway: MLflow does not answer.
        """
        target = self.path(found)
        with self._alone(found.name):
            if target.is_dir():
                os.utime(target)
            else:
                self._fill(found, target)
                self._prune(found)
        return target

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

    def discard(self, found: Registered) -> None:
        """Remove a copy, so that `get` downloads it."""
        with self._alone(found.name):
            shutil.rmtree(self.path(found), ignore_errors=True)

    def remember(self, model: str, found: Registered) -> None:
        """The version that MODEL stands for, which was found to be good."""
        with self._alone(found.name), file_written_whole(self._memory(model)) as file:
            file.write_bytes(orjson.dumps(asdict(found)))

    def remembered(self, model: str) -> Registered | None:
        """The version that MODEL last stood for, if its copy is here."""
        found = _read(self._memory(model))
        return found if found is not None and self.path(found).is_dir() else None

    def _fill(self, found: Registered, target: Path) -> None:
        with folder_written_whole(target) as folder:
            files = folder / ".download"
            bundle = self._download(found, files)
            if not bundle.is_dir():
                raise InputError(f"{found.uri} holds no bundle")
            try:
                verified_manifest(bundle)
            except InputError as error:
                raise InputError(str(error).replace(str(bundle), found.uri)) from None
            for path in bundle.iterdir():
                path.rename(folder / path.name)
            shutil.rmtree(files)

    def _prune(self, new: Registered) -> None:
        """Leave the newest versions, and those that some MODEL stands for; the lock is held."""
        wanted = {self.path(found) for file in self.folder.glob("@*.json") if (found := _read(file)) is not None}
        others = [path for path in self._models(new.name).iterdir() if path.is_dir() and path not in wanted]
        partial = [path for path in others if path.name.startswith(".")]  # of processes that were killed
        whole = sorted((path for path in others if path not in partial), key=lambda path: -path.stat().st_mtime)
        for path in (*partial, *whole[KEEP:]):
            if path != self.path(new):
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One process and thread at a time for a model; a lock that a dead process drops."""
        folder = self._models(name)
        folder.mkdir(exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _models(self, name: str) -> Path:
        return self.folder / _file_name(name)

    def _memory(self, model: str) -> Path:
        return self.folder / f"@{_file_name(model)}.json"


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
