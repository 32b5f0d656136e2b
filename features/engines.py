"""Where units of work run: threads of this process, or a Ray cluster."""

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Engine(Protocol):
    """Runs a function on every unit; results come in any order, all those of a unit or an error."""

    def run(self, function: Callable[[int], Iterable[T]], units: int) -> Iterator[T]:
        """What `function` gives for the units 0 … units − 1."""


class LocalEngine:
    """Threads: Arrow, Polars and NumPy release the interpreter's lock where the time goes."""

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers or len(os.sched_getaffinity(0))

    def run(self, function: Callable[[int], Iterable[T]], units: int) -> Iterator[T]:
        """See `Engine`. At most two results for each thread wait to be taken, so memory stays bounded."""
        todo = iter(range(units))
        lock, stop = threading.Lock(), threading.Event()
        done: queue.Queue[T | _Ended] = queue.Queue(2 * self._workers)

        def put(item: "T | _Ended") -> None:
            while not stop.is_set():
                try:
                    done.put(item, timeout=0.1)
                    return
                except queue.Full:
                    continue

        def work() -> None:
            try:
                while not stop.is_set():
                    with lock:
                        unit = next(todo, None)
                    if unit is None:
                        break
                    for result in function(unit):
                        put(result)
                        if stop.is_set():
                            break
                put(_Ended(None))
            except BaseException as error:
                put(_Ended(error))

        threads = [
            threading.Thread(target=work, name=f"masknet-prepare-{n}", daemon=True) for n in range(self._workers)
        ]
        for thread in threads:
            thread.start()
        try:
            running = len(threads)
            while running:
                item = done.get()
                if not isinstance(item, _Ended):
                    yield item
                elif item.error is None:
                    running -= 1
                else:
                    raise item.error
        finally:
            stop.set()
            for thread in threads:
                thread.join()


class _Ended:
    """A thread has no more to give, or has failed."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
