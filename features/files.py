"""Files that are either whole or absent: write aside, then rename."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from features.errors import InputError

_CHUNK = 1 << 20
_TRIES = 100  # to lock a folder that others make and remove


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hash_tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by POSIX path relative to it, in sorted order."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def canonical_json(value: Any) -> bytes:
    """The same bytes for equal values, whatever the order of their keys; the base of every digest here."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinities are refused, since other readers do not know them."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read JSON, or say which file of `what` is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{what}: {path} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{what}: {path} is damaged: {error}") from None


def require_absent(target: Path) -> None:
    """InputError if `target` is there already and is not an empty folder."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} exists already; remove it or choose another folder")


@contextmanager
def folder_written_whole(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that becomes `target` only when the block ends without an error.

    Raises:
        InputError: `target` exists and is not an empty folder, or cannot be made; nothing is overwritten.
    """
    require_absent(target)
    target = target.absolute()
    aside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}") from None
    try:
        yield aside
        aside.replace(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def file_written_whole(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` that replaces `target` only when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        yield aside
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path, command: str) -> Iterator[None]:
    """For the length of a block no other process works in the folder, which is made; one that dies lets go of it.

    The block may remove the folder, with `remove_folder`: who has waited meanwhile begins in a new one.

    Raises:
        InputError: another process, which runs `command`, works in it, or it cannot be written.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("w")
        except OSError as error:
            if isinstance(error, (FileNotFoundError, FileExistsError)) and tries_left:
                continue  # it was removed just now, or else a file or a link to nothing is in its place
            raise InputError(f"{folder} cannot be written: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{folder} is in use by another {command}") from None
            if is_at(lock.fileno(), folder / "lock"):
                yield
                return
    raise InputError(f"{folder} is in use by others, again and again")


def is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`: a lock on one that was removed keeps nobody out."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def remove_folder(folder: Path) -> None:
    """Remove a folder, at once for those who look at it and not file by file."""
    aside = folder.with_name(f".{folder.name.lstrip('.')}.removed-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)  # of a killed process with this number: in containers most have the same
    with suppress(FileNotFoundError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
