"""A folder that one process at a time works in, and may remove."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from features.errors import InputError
from features.files import alone, remove_folder


def test_a_second_one_is_told_and_a_later_one_goes_on(tmp_path: Path) -> None:
    with alone(tmp_path / "work", "masknet score"):
        message = r"work is in use by another masknet score$"
        with pytest.raises(InputError, match=message), alone(tmp_path / "work", "masknet score"):
            raise AssertionError("both work in it")
    with alone(tmp_path / "work", "masknet score"):
        pass


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"file/work cannot be written: Not a directory$"
    with pytest.raises(InputError, match=message), alone(tmp_path / "file" / "work", "masknet tune"):
        pass


@pytest.mark.parametrize("before", ["the file is open", "it is locked"])
def test_a_lock_on_what_was_removed_meanwhile_is_none(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before ends, and removes the folder, while this one is about to lock it."""
    work, flock, opened, removed = tmp_path / "work", fcntl.flock, Path.open, list[str]()

    def remove_once() -> None:
        if not removed:
            removed.append(before)
            remove_folder(work)

    def lock(*given: Any) -> None:
        if before == "it is locked":
            remove_once()
        flock(*given)

    def open_(path: Path, *given: Any) -> Any:
        if before == "the file is open":
            remove_once()
        return opened(path, *given)

    monkeypatch.setattr("features.files.fcntl.flock", lock)
    monkeypatch.setattr(Path, "open", open_)
    with alone(work, "masknet score"):
        assert [path.name for path in work.iterdir()] == ["lock"]
        with pytest.raises(InputError, match="in use by another"), alone(work, "masknet score"):
            raise AssertionError("both work in it")
    assert removed == [before]
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_a_folder_that_is_always_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.files.is_at", lambda file, path: False)
    with (
        pytest.raises(InputError, match="in use by others, again and again"),
        alone(tmp_path / "work", "masknet score"),
    ):
        raise AssertionError("never alone")


def test_a_link_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    (tmp_path / "work").symlink_to(tmp_path / "away" / "work")
    with pytest.raises(InputError, match="work cannot be written: File exists"), alone(tmp_path / "work", "masknet"):
        raise AssertionError("there is nothing to work in")


def test_what_a_killed_process_has_not_removed_is_in_nobodys_way(tmp_path: Path) -> None:
    left = tmp_path / f".work.removed-{os.getpid()}"
    for folder in (left, tmp_path / "work"):
        folder.mkdir()
        (folder / "part").write_text("")
    remove_folder(tmp_path / "work")
    assert list(tmp_path.iterdir()) == []


WORKER = """
import os, sys
from pathlib import Path
from features.errors import InputError
from features.files import alone, remove_folder

work, busy = Path(sys.argv[1]), Path(sys.argv[2])
turns = 0
while turns < 200:
    try:
        with alone(work, "masknet score"):
            os.close(os.open(busy, os.O_CREAT | os.O_EXCL))  # fails where another works in it
            (work / "part").write_text("half")
            assert (work / "part").read_text() == "half"
            busy.unlink()
            remove_folder(work)
            turns += 1
    except InputError as error:
        assert "in use by another masknet score" in str(error)
"""


@pytest.mark.long
def test_processes_that_make_and_remove_a_folder_are_alone_in_it(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    command = [sys.executable, "-c", WORKER, str(tmp_path / "home" / "work"), str(tmp_path / "busy")]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    told = [worker.communicate(timeout=120)[1] for worker in workers]
    assert told == [""] * 3
    assert list((tmp_path / "home").iterdir()) == []
