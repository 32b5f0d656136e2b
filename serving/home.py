"""A folder for each server: BentoML keeps metrics there, and empties that folder whenever a server starts."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "masknet-serve-"
_LOCK = "running"


def make_home() -> Path:
    """A new folder, nobody else's to write to. It is this process's, and of what it becomes, until that ends.

    Folders whose process has ended, which itself cannot remove what it uses to its end, are removed.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        _remove_left(folder)
    home = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = os.open(home / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.set_inheritable(lock, True)  # through exec: the server holds it
    return home


def _remove_left(folder: Path) -> None:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return  # somebody else's, or just being made
    try:
        if os.fstat(lock).st_uid == os.getuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass  # its server runs
    finally:
        os.close(lock)
