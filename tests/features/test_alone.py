"""A folder that one process at a time works in."""

from pathlib import Path

import pytest

from features.errors import InputError
from features.files import alone


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
