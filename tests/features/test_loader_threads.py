"""The loader's threads end with what they work for."""

import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from features.loader import THREAD, _ahead

ROOT = Path(__file__).parents[2]


def living() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == THREAD]


def numbers(last: int = 10**9) -> Generator[int, None, None]:
    for number in range(last):
        time.sleep(0.001)  # so that the thread is at work, and not only waiting for room
        yield number


def nested() -> Generator[int, None, None]:
    yield from _ahead(numbers, 1)


def failing() -> Generator[int, None, None]:
    yield 1
    raise ValueError("a damaged row group")


@pytest.mark.parametrize("make", [numbers, nested])
@pytest.mark.parametrize("wait", [0.0, 0.02])  # the second lets the queue fill up
def test_a_dropped_generator_takes_its_threads_along(make: type[Generator[int, None, None]], wait: float) -> None:
    items = _ahead(make, 2)
    assert next(items) == 0
    assert living()
    time.sleep(wait)
    del items
    assert living() == []


def test_a_closed_generator_takes_its_threads_along() -> None:
    items = _ahead(nested, 2)
    next(items)
    items.close()
    assert living() == []
    assert list(items) == []


def test_no_thread_is_left_at_the_end() -> None:
    assert list(_ahead(lambda: numbers(5), 2)) == [0, 1, 2, 3, 4]
    assert living() == []


def test_no_thread_is_left_after_an_error() -> None:
    items = _ahead(lambda: _ahead(failing, 1), 2)
    assert next(items) == 1
    with pytest.raises(ValueError, match="damaged row group"):
        next(items)
    assert living() == []


@pytest.mark.long
def test_no_thread_is_left_when_the_interpreter_goes() -> None:
    """`held` is a global: nothing closes it. What was registered first is called last."""
    script = """
import atexit, threading
atexit.register(lambda: print([t.name for t in threading.enumerate() if t is not threading.main_thread()]))
from tests.features.test_loader_threads import living, nested
from features.loader import _ahead
held = _ahead(nested, 2)
next(held)
print(living())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines() == [f"['{THREAD}', '{THREAD}']", "[]"]
