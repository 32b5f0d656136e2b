"""Worker processes that share the cores, each with one job at a time, for as long as there are jobs."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from features.errors import one_line
from training.errors import Failure

DONE, DIVERGED, FAILED = "done", "diverged", "failed"  # a result's "status"
Job = TypeVar("Job")
Result = dict[str, Any]


def outcome(work: Callable[[], Result]) -> Result:
    """What a job's work comes to; never raises for what goes wrong in it, so that one job cannot end all."""
    try:
        return work()
    except Failure as error:
        return {"status": DIVERGED, "reason": str(error)}
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        return {"status": FAILED, "reason": reason, "traceback": traceback.format_exc()}


def died() -> Result:
    """Of a job whose process has ended without a result."""
    return {"status": FAILED, "reason": "its process died"}


class Workers(Generic[Job]):
    """Runs jobs in spawned processes; everything but `work` happens in this one.

    Args:
        take: the next job, or None where there is none now; asked again when another job has ended.
        work: done in a worker; a function of a module, that raises nothing which is to be lived with.
        lost: the result of a job whose process has died; which of several jobs killed theirs is not known.
        done: told of every job that ended and of its result.
        look: called between, `every` seconds apart or more often.
    """

    def __init__(
        self,
        take: Callable[[], Job | None],
        work: Callable[[Job], Result],
        lost: Callable[[Job], Result],
        done: Callable[[Job, Result], None],
        look: Callable[[], None] = lambda: None,
        every: float = 1.0,
    ) -> None:
        self._take, self._work, self._lost, self._done = take, work, lost, done
        self._look, self._every = look, every
        self._running: dict[Future[Result], Job] = {}
        self._held: Job | None = None  # taken, but handed to no worker yet

    def run(self, processes: int) -> None:
        """Run jobs, at most `processes` at a time, until none is left and none runs; dead workers are started anew."""
        while self._run(processes):
            pass

    def _run(self, processes: int) -> bool:
        """Whether a worker has died, before the last job ended."""
        with _pool(processes) as pool:
            while True:
                try:
                    self._fill(pool, processes)
                    if not self._running:
                        return False
                    # With a limit, since a signal that another thread has taken wakes no waiting main thread.
                    ended = wait(self._running, timeout=self._every, return_when=FIRST_COMPLETED).done
                    self._look()
                    for future in sorted(ended, key=lambda future: future.exception() is not None):
                        result = future.result()
                        self._done(self._running.pop(future), result)
                except BrokenProcessPool:
                    lost = list(self._running.values())
                    self._running.clear()
                    for job in lost:
                        self._done(job, self._lost(job))
                    return True

    def _fill(self, pool: ProcessPoolExecutor, processes: int) -> None:
        while len(self._running) < processes:
            self._held = job = self._held or self._take()
            if job is None:
                return
            with _without_interrupts():
                self._running[pool.submit(self._work, job)] = job
            self._held = None


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that share the cores evenly, and end with this block."""
    cores = len(os.sched_getaffinity(0))
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, cores // processes)))
    os.environ.setdefault("POLARS_MAX_THREADS", str(threads))  # for the workers; here Polars has started already
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=(threads,))
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()  # their jobs have no result yet: the same command runs them again
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process started in this block never sees a terminal's Ctrl-C, which reaches all of them: this one ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from training.quiet import quiet_libraries

    quiet_libraries()
    import torch

    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers: what they would go on with is not theirs any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one
    parent.join()
    os._exit(1)
