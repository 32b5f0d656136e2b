"""Shadow scoring: another model scores what was asked, after the answer and only while there is room."""

import logging
import queue
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, Protocol

from serving.api.requests import RankRequest
from serving.failures import log_failure
from serving.life.cores import lower_priority
from serving.ranking.engine import RankingEngine
from serving.trace import Trace

WAITING = 4  # requests that wait to be scored; what comes then is left out
_log = logging.getLogger("bentoml.masknet")


class Counts(Protocol):
    """Who counts what a shadow has scored: the metrics."""

    def answered(self, trace: Trace) -> None:
        """A request was scored."""

    def dropped(self, what: Literal["log", "shadow"], count: int = 1) -> None:
        """So many were not."""


class Log(Protocol):
    """Who writes down what was scored: the prediction log."""

    def offer(self, trace: Trace) -> None:
        """A request was scored."""


class Shadow:
    """A thread that scores requests with the shadow's engine and tells metrics and log.

    Args:
        engine: the engine that can score the request now, or None.
        share: of requests.
        counts: told of each, or None.
        log: likewise.
    """

    def __init__(
        self, engine: Callable[[], RankingEngine | None], share: float, counts: Counts | None, log: Log | None
    ) -> None:
        self._engine, self._share, self._counts, self._log = engine, share, counts, log
        self._waiting: queue.Queue[tuple[RankRequest, Trace] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="masknet shadow", daemon=True)
        self._random = random.Random()

    def start(self) -> None:
        """From now on requests are scored."""
        self._thread.start()

    def stop(self) -> None:
        """End after the request that is being scored; those that wait are left out."""
        with suppress(queue.Empty):  # the thread takes from it as well
            while True:
                self._waiting.get_nowait()
        self._waiting.put(None)
        self._thread.join()

    def offer(self, request: RankRequest, trace: Trace) -> None:
        """Take an answered request, or leave it out; returns at once."""
        if self._random.random() >= self._share:
            return
        try:
            self._waiting.put_nowait((request, trace))
        except queue.Full:
            if self._counts:
                self._counts.dropped("shadow")

    def _run(self) -> None:
        lower_priority()
        while (taken := self._waiting.get()) is not None:
            try:
                self._score(*taken)
            except Exception:
                log_failure(_log, "the shadow failed on a request")

    def _score(self, request: RankRequest, answered: Trace) -> None:
        engine = self._engine()
        if engine is None:
            return
        trace = Trace(answered.route, answered.request_id, name=engine.name, version=engine.version, role="shadow")
        trace.context, trace.columns = answered.context, answered.columns
        # The time that the answer was given for, not that of the scoring.
        engine.rank(request.context, request.candidates, 1, request.time or answered.time, trace)
        if self._counts:
            self._counts.answered(trace)
        if self._log:
            self._log.offer(trace)
