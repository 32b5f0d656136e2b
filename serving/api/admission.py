"""Which requests a worker takes on: a few compute, a few wait, and the others are told at once to come back later.

A request computes in one of `concurrency` threads, which take the next waiting one without asking the event loop. Its
place in the queue ends with its turn, its deadline, or its client. While more work arrives than can be done (over the
last 20 service times), only one request per thread may wait: a longer queue would hardly answer more, only later.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from serving.api.errors import ApiError
from serving.settings import Limits

T = TypeVar("T")
_SHORT = 1  # waiting requests per thread under overload: two service times, and what refusing others takes meanwhile
_MEMORY = 20  # service times over which the load is taken
_BLEND = 0.1  # weight of a new service time in their mean
COMPUTE_SECONDS = 10.0  # after which a request that computes is given up: its client gets an error, its thread goes on


class Gone(Exception):
    """The client closed its connection before its turn came; nobody reads an answer."""


class Admission:
    """The queue of one worker. All methods are called in its event loop."""

    def __init__(
        self,
        limits: Limits,
        told: Callable[[int], None],
        clock: Callable[[], float] = time.perf_counter,
        compute_seconds: float = COMPUTE_SECONDS,
    ) -> None:
        """`told` hears how many requests wait whenever that changes."""
        self._longest = limits.deadline_ms / 1e3 + compute_seconds
        self._limits = limits
        self._told = told
        self._clock = clock
        self._pool = ThreadPoolExecutor(limits.concurrency, thread_name_prefix="masknet-compute")
        self._taken = 0  # waiting or computing
        self._service = 0.0  # mean seconds of computing one request
        self._load = 0.0  # of the threads' time, what has arrived lately would take; 1 is all of it
        self._last_arrival = clock()

    @property
    def waiting(self) -> int:
        """Requests whose turn has not come."""
        return max(0, self._taken - self._limits.concurrency)

    def arrive(self) -> None:
        """Count a request, and refuse it where it would find no place: before its body is read.

        Raises:
            ApiError: 429 where the queue is full, 503 where its turn could not come before the deadline.
        """
        now = self._clock()
        share = self._service / self._limits.concurrency
        if share > 0:
            self._load *= math.exp(-(now - self._last_arrival) / (_MEMORY * share))
            self._load += 1 / _MEMORY
        self._last_arrival = now
        self._require_place(now, now)

    async def run(self, work: Callable[[], T], arrived: float, gone: Callable[[], Awaitable[None]]) -> T:
        """What `work` returns or raises, from a thread, in turn.

        Args:
            work: parses and scores one request.
            arrived: when it did, by the clock.
            gone: returns once the client has closed the connection.

        Raises:
            ApiError: 429 or 503 where `work` was not begun, 503 where it takes longer than anybody waits.
            Gone: likewise, for want of a client.
        """
        self._require_place(self._clock(), arrived)
        future = self._pool.submit(self._timed, work)
        self._count(1)
        # Its place is free when its thread is, whoever still waits for it; that is counted before anybody hears of it.
        future.add_done_callback(partial(self._leave, asyncio.get_running_loop()))
        done = asyncio.wrap_future(future)
        try:
            async with asyncio.timeout(self._longest):
                if self.waiting:
                    await self._turn(future, done, arrived, gone)
                return await done
        except TimeoutError:
            raise ApiError(503, "too_slow", "the request takes too long to compute", retry_after=1) from None
        finally:
            done.cancel()  # of consequence only where this task was given up

    def close(self) -> None:
        """Let the threads end; what computes is finished."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _require_place(self, now: float, arrived: float) -> None:
        wait = (self.waiting + min(1, self._taken)) * self._service / self._limits.concurrency
        limit = self._limits.queue
        if self._load > 1:
            limit = min(limit, _SHORT * self._limits.concurrency)
        if self._taken >= self._limits.concurrency + limit:
            raise ApiError(429, "queue_full", "too many requests wait already", retry_after=_seconds(wait))
        if now - arrived + wait > self._limits.deadline_ms / 1e3:
            raise _too_late(self._limits, wait)

    async def _turn(
        self, future: "Future[T]", done: "asyncio.Future[T]", arrived: float, gone: Callable[[], Awaitable[None]]
    ) -> None:
        """Wait until the work is done; cancel it where its deadline passes or the client leaves before it began."""
        left = arrived + self._limits.deadline_ms / 1e3 - self._clock()
        leaving = asyncio.ensure_future(gone())
        either: set[asyncio.Future[Any]] = {done, leaving}
        try:
            await asyncio.wait(either, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
            if not done.done() and future.cancel():
                raise Gone if leaving.done() else _too_late(self._limits, self._service)
        finally:
            leaving.cancel()

    def _timed(self, work: Callable[[], T]) -> T:
        start = self._clock()
        try:
            return work()
        finally:
            seconds = self._clock() - start
            self._service += (seconds - self._service) * (_BLEND if self._service else 1.0)

    def _leave(self, loop: asyncio.AbstractEventLoop, _: object) -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody counts
            loop.call_soon_threadsafe(self._count, -1)

    def _count(self, change: int) -> None:
        before = self.waiting
        self._taken += change
        if self.waiting != before:
            self._told(self.waiting)


def _too_late(limits: Limits, wait: float) -> ApiError:
    message = f"the request's turn does not come within {limits.deadline_ms:g} ms"
    return ApiError(503, "deadline", message, retry_after=_seconds(wait))


def _seconds(wait: float) -> int:
    return max(1, math.ceil(wait))
