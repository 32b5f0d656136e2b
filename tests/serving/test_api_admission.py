"""The queue of a worker, with threads that wait for the test and a clock that it moves."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serving.api.admission import Admission, Gone
from serving.api.errors import ApiError
from serving.settings import Limits


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """An admission whose work takes as long as the test wants."""

    def __init__(self, **limits: Any) -> None:
        self.clock, self.told, self.done = Clock(), list[int](), list[str]()
        self.admission = Admission(Limits(**limits), self.told.append, self.clock)
        self.go = threading.Event()

    def ask(self, name: str, gone: Callable[[], Awaitable[None]] | None = None) -> "asyncio.Task[str]":
        async def stays() -> None:
            await asyncio.Event().wait()

        def work() -> str:
            self.go.wait(10)
            self.done.append(name)
            return name

        arrived = self.clock()
        return asyncio.ensure_future(self.admission.run(work, arrived, gone or stays))


def code(task: "asyncio.Task[str]") -> tuple[int, str, int | None]:
    error = task.exception()
    assert isinstance(error, ApiError)
    return error.status, error.code, error.retry_after


def test_one_computes_some_wait_in_turn_and_one_more_is_429() -> None:
    async def run() -> None:
        bench = Bench(concurrency=1, queue=2)
        tasks = [bench.ask(name) for name in "abcd"]
        await asyncio.sleep(0.05)
        assert code(tasks[3]) == (429, "queue_full", 1)
        with pytest.raises(ApiError, match="wait already"):
            bench.admission.arrive()  # before a body is read
        bench.go.set()
        assert await asyncio.gather(*tasks[:3]) == ["a", "b", "c"]
        assert bench.done == ["a", "b", "c"]
        assert bench.told == [1, 2, 1, 0]
        bench.admission.arrive()

    asyncio.run(run())


def test_who_waits_past_the_deadline_is_503_and_never_computed() -> None:
    async def run() -> None:
        bench = Bench(concurrency=1, queue=5, deadline_ms=50)
        first, late = bench.ask("first"), bench.ask("late")
        await asyncio.wait([late], timeout=5)
        assert code(late) == (503, "deadline", 1)
        bench.go.set()
        assert await first == "first"  # has begun, and is finished
        assert await bench.ask("next") == "next"
        assert bench.done == ["first", "next"]

    asyncio.run(run())


def test_a_client_that_leaves_while_it_waits_is_not_computed() -> None:
    async def run() -> None:
        async def leaves() -> None:
            await asyncio.sleep(0.02)

        bench = Bench(concurrency=1, queue=5)
        first, left = bench.ask("first"), bench.ask("left", leaves)
        with pytest.raises(Gone):
            await left
        assert bench.admission.waiting == 0
        bench.go.set()
        await first
        assert bench.done == ["first"]

    asyncio.run(run())


def test_a_turn_that_cannot_come_in_time_is_refused_at_once() -> None:
    async def run() -> None:
        bench = Bench(concurrency=1, queue=50, deadline_ms=1000)
        slow = bench.ask("slow")
        await asyncio.sleep(0.05)
        bench.clock.now += 0.4  # so long does a request take
        bench.go.set()
        await slow
        bench.go.clear()
        waiting = [bench.ask(str(i)) for i in range(3)]
        await asyncio.sleep(0.05)
        refused = bench.ask("refused")  # three service times away: 1.2 s
        await asyncio.sleep(0.05)
        assert code(refused) == (503, "deadline", 2)
        bench.go.set()
        await asyncio.gather(*waiting)

    asyncio.run(run())


def test_under_overload_one_waits_for_a_thread_and_later_more_again() -> None:
    async def run() -> None:
        bench = Bench(concurrency=1, queue=10, deadline_ms=60_000)
        slow = bench.ask("slow")
        await asyncio.sleep(0.05)
        bench.clock.now += 0.1
        bench.go.set()
        await slow
        bench.go.clear()
        for _ in range(60):  # twice as many as a thread can do
            bench.clock.now += 0.05
            bench.admission.arrive()
        tasks = [bench.ask(str(i)) for i in range(3)]
        await asyncio.sleep(0.05)
        assert code(tasks[2])[:2] == (429, "queue_full")
        bench.clock.now += 60
        bench.admission.arrive()  # the load is over
        more = [bench.ask(str(i)) for i in range(3, 10)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in more)
        bench.go.set()
        await asyncio.gather(*tasks[:2], *more)

    asyncio.run(run())


def test_errors_of_the_work_are_the_callers() -> None:
    async def run() -> None:
        admission = Admission(Limits(), lambda depth: None)

        def work() -> None:
            raise ApiError(422, "bad_value", "no")

        async def stays() -> None:
            await asyncio.Event().wait()

        with pytest.raises(ApiError, match="no"):
            await admission.run(work, admission._clock(), stays)
        assert admission.waiting == 0
        admission.close()

    asyncio.run(run())


def test_what_computes_too_long_is_given_up_and_keeps_its_place_until_its_thread_is_free() -> None:
    async def run() -> None:
        bench = Bench(concurrency=1, queue=0, deadline_ms=50)
        bench.admission = Admission(Limits(concurrency=1, queue=0, deadline_ms=50), bench.told.append, bench.clock, 0.1)
        slow = bench.ask("slow")
        await asyncio.sleep(0.3)
        assert code(slow) == (503, "too_slow", 1)
        with pytest.raises(ApiError, match="wait already"):
            bench.admission.arrive()
        bench.go.set()
        await asyncio.sleep(0.1)
        assert await bench.ask("next") == "next"

    asyncio.run(run())
