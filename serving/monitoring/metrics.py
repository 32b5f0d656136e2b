"""What the service tells Prometheus of its requests, its models and itself."""

import logging
import threading
from typing import Literal

from serving.monitoring.families import CANDIDATES, REQUEST_SECONDS, SCORES, STAGE_SECONDS, families
from serving.monitoring.spans import add_spans
from serving.monitoring.tallies import CounterTally, HistogramTally
from serving.trace import Role, Trace

ROUTES = frozenset({"/rank", "/predict", "/model", "/docs.json"})
OTHER = "other"  # routes that are none, and versions after the first MOST_VERSIONS
MOST_VERSIONS = 100  # with metrics of their own: the client cannot forget one while its process lives
EVERY = 0.5  # seconds between two hand-overs of counts
_log = logging.getLogger(__name__)


class Watch:
    """Counts requests, cheaply; a thread hands the counts on twice a second. To be made in a worker, not before.

    Everything may be called from several threads.
    """

    def __init__(self) -> None:
        self._families = found = families()
        self._requests, self._refused = CounterTally(found.requests), CounterTally(found.refused)
        self._values, self._missing = CounterTally(found.values), CounterTally(found.missing)
        self._unknown = CounterTally(found.unknown)
        self._request_seconds = HistogramTally(found.request_seconds, REQUEST_SECONDS)
        self._stage_seconds = HistogramTally(found.stage_seconds, STAGE_SECONDS)
        self._candidates = HistogramTally(found.candidates, CANDIDATES)
        self._scores = HistogramTally(found.scores, SCORES)
        self._versions = set[str]()
        self._models = dict[Role, tuple[str, str]]()
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="masknet metrics", daemon=True)
        self._thread.start()

    def answered(self, trace: Trace) -> None:
        """Count a request that got its answer; a shadow's scoring is no request: its scores and stages alone count."""
        of_model = (self._version(trace.version), trace.role)
        with self._lock:
            for stage, seconds in trace.seconds.items():
                self._stage_seconds.add((stage, *of_model), seconds)
            if trace.role != "shadow":
                self._count_request(trace, of_model)
            if trace.score_N is not None:
                self._scores.add_all(of_model, trace.score_N)
        add_spans(trace)

    def refused(self, route: str, status: int, code: str) -> None:
        """Count a request that got an error: 429 and 503 are those shed under load."""
        with self._lock:
            self._requests.add((_route(route), str(status), "", ""))
            self._refused.add((_route(route), str(status), code))

    def queue(self, depth: int) -> None:
        """Say how many requests of this worker wait."""
        self._families.queue.set(depth)

    def model(self, name: str, version: str, role: Role) -> None:
        """Say which model this worker has in a role; the one before it has it no longer."""
        gauge = self._families.model
        with self._lock:
            before, now = self._models.get(role), (name, self._version(version))
            self._models[role] = now
            if before is not None:
                gauge.labels(*before, role).set(0)
            gauge.labels(*now, role).set(1)

    def swap(self, outcome: str) -> None:
        """Count a change of model: done, refused, postponed or unreachable."""
        self._families.swaps.labels(outcome).inc()

    def fetch(self, missed: int, timed_out: bool = False) -> None:
        """Count the keys that the feature store did not have, or not in time."""
        if missed:
            self._families.store_missed.inc(missed)
        if timed_out:
            self._families.store_timeouts.inc()

    def dropped(self, what: Literal["log", "shadow"], count: int = 1) -> None:
        """Count what was left out under load."""
        self._families.dropped.labels(what).inc(count)

    def flush(self) -> None:
        """Hand on what was counted."""
        for counter in (self._requests, self._refused, self._values, self._missing, self._unknown):
            counter.hand_on(self._lock)
        for histogram in (self._request_seconds, self._stage_seconds, self._candidates, self._scores):
            histogram.hand_on(self._lock)

    def close(self) -> None:
        """Hand on the last counts and end the thread."""
        self._closed.set()
        self._thread.join()

    def _count_request(self, trace: Trace, of_model: tuple[str, Role]) -> None:
        route = _route(trace.route)
        self._requests.add((route, "200", *of_model))
        self._request_seconds.add((route, *of_model), sum(trace.seconds.values()))
        self._candidates.add((route, *of_model), trace.rows)
        self._values.add_all(trace.values, of_model)
        self._missing.add_all(trace.missing, of_model)
        self._unknown.add_all(trace.unknown, of_model)

    def _version(self, version: str) -> str:
        if version in self._versions:
            return version
        if len(self._versions) < MOST_VERSIONS:
            self._versions.add(version)
            return version
        return OTHER

    def _run(self) -> None:
        last = False
        while not last:
            last = self._closed.wait(EVERY)
            try:
                self.flush()
            except Exception:
                _log.exception("metrics were lost")


def _route(path: str) -> str:
    return path if path in ROUTES else OTHER
