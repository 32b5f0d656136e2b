"""The one thread that talks to MLflow while training runs: sends the spool, waits while MLflow is away, tries again."""

import threading
import time
from collections.abc import Callable

from training.tracking.mlflow_run import MlflowRun
from training.tracking.outages import reason
from training.tracking.spool import Spool

FLUSH_SECONDS = 1.0  # longest that a record stays in memory alone
SEND_SECONDS = 5.0  # between batches: a call costs SQLite 20 ms, and a number in a large batch 0.1
LONGEST_PAUSE = 60.0  # seconds between two tries while MLflow is away; a second while someone waits


class Sender:
    """Brings a spool's records to an MLflow run, in order, until `stop`."""

    def __init__(self, run: MlflowRun, tell: Callable[[str], None]) -> None:
        """Nothing happens before `start`. `tell` gives a person a line."""
        self.tell = tell
        self.failure: Exception | None = None  # of the latest try
        self.status: str | None = None  # that the run ends with, when its last record was sent
        self._run = run
        self._spool: Spool | None = None
        self._opened: Callable[[], None] = _nothing
        self._first_try, self._has_spool = threading.Event(), threading.Event()
        self._wake, self._state = threading.Event(), threading.Condition()
        self._asked = self._answered = self._waiting = 0
        self._ended = False
        self._told_fault = self._told_refusal = self._told_failure = False
        self._pause, self._next_try = 0.0, 0.0
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def start(self, patience: float) -> Exception | None:
        """Try to open the run; return what was wrong, or None after success or `patience` seconds without an answer."""
        self._thread.start()
        self._first_try.wait(patience)
        return self.failure

    @property
    def is_connected(self) -> bool:
        """Whether the latest try went well."""
        return self._run.is_open and self.failure is None

    def attach(self, spool: Spool, opened: Callable[[], None]) -> None:
        """Begin to send what this spool takes; `opened` is called after MLflow has opened the run."""
        self._spool, self._opened = spool, opened
        self._has_spool.set()

    def drained(self, patience: float) -> bool:
        """Wait until all that was recorded so far has been sent; False if that took longer than `patience` seconds."""
        with self._state:
            self._asked += 1
            self._waiting += 1
            mine = self._asked
            self._wake.set()
            try:
                return self._state.wait_for(lambda: self._answered >= mine, patience)
            finally:
                self._waiting -= 1

    def stop(self) -> None:
        """End the thread; nothing more is sent, so that a later process may do it."""
        self._ended = True
        self._run.abandon()
        self._has_spool.set()
        self._wake.set()

    def _work(self) -> None:
        try:
            self._run.open()
        except Exception as error:
            self.failure = error
        self._first_try.set()
        self._has_spool.wait()
        if self._ended:
            return
        if self._run.is_open:
            self._opened()
        elif self.failure is not None:
            self._failed(self.failure)
        while not self._ended:
            self._wake.wait(FLUSH_SECONDS)
            self._wake.clear()
            self._pass()

    def _pass(self) -> None:
        assert self._spool is not None
        asked, status = self._asked, self.status
        self._spool.flush()
        if self._spool.fault is not None and not self._told_fault:
            self._told_fault = True
            self.tell(f"recording ends, training goes on: {self._spool.path} cannot be written: {self._spool.fault}")
        if time.monotonic() < self._next_try and not self._waiting:
            return
        try:
            self._send(self._spool, status)
        except Exception as error:
            self._failed(error)
            return
        self._succeeded()
        with self._state:
            self._answered = asked
            self._state.notify_all()

    def _send(self, spool: Spool, status: str | None) -> None:
        if not self._run.is_open:
            self._run.open()
            self._opened()
        if self._run.is_new:
            self._run.is_new = False
            spool.mark_sent(0)
        while batch := spool.unsent():
            refused = self._run.send(batch.records, spool.path.parent.parent)
            spool.mark_sent(batch.end)
            if refused and not self._told_refusal:
                self._told_refusal = True
                more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
                self.tell(f"MLflow does not take {refused[0]}{more}; it stays in {spool.path}")
        if status is not None:
            self._run.set_status(status)

    def _failed(self, error: Exception) -> None:
        self.failure = error
        if not self._told_failure and not self._ended:
            self._told_failure = True
            self.tell(f"MLflow takes no records ({reason(error)}): they wait on disk, and training goes on")
        self._pause = min(max(2 * self._pause, FLUSH_SECONDS), LONGEST_PAUSE)
        self._next_try = time.monotonic() + self._pause

    def _succeeded(self) -> None:
        if self._told_failure:
            self.tell("MLflow is back and has every record")
        self.failure, self._told_failure = None, False
        self._pause, self._next_try = 0.0, time.monotonic() + SEND_SECONDS


def _nothing() -> None:
    pass
