"""Folders that processes use for a while, and that others may remove only when nobody does.

The mark is a shared lock on the folder itself, which its process drops when it ends, however it ends.
"""

import errno
import fcntl
import os
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from features.files import is_at, remove_folder

_TRIES = 100  # to mark a folder that others make and remove


def use_folder(folder: Path, by: object) -> None:
    """Mark a folder, which is made where it is missing, as used for as long as `by` lives.

    Raises:
        OSError: it cannot be made.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, FileExistsError):
            if not tries_left:
                raise  # a file is in its place, or a link that leads nowhere
            continue  # it was removed just now
        with suppress(OSError):  # of a file system without such locks, where nobody can remove it either
            fcntl.flock(file, fcntl.LOCK_SH)
        if is_at(file, folder):
            weakref.finalize(by, os.close, file)
            return
        os.close(file)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(folder))


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """By the times of their last change or use; what is gone comes last."""
    return sorted(paths, key=_time, reverse=True)


def remove_old(folders: Iterable[Path], keep: int) -> None:
    """Remove all but the newest so many folders, and those that processes use."""
    for folder in newest_first(folders)[keep:]:
        with suppress(OSError):
            file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_folder(folder)
            finally:
                os.close(file)


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
