"""The metrics that /metrics tells of the service, besides BentoML's own.

prometheus_client is imported on first use: BentoML sets PROMETHEUS_MULTIPROC_DIR in a worker after it has imported the
service, and only what is imported later adds up over workers (https://docs.bentoml.com, Metrics). A process has each
metric once, however many services it makes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge, Histogram

# Seconds. A request's begin at half a millisecond; stages are parts of it, some of which take a tenth of that.
REQUEST_SECONDS = (
    0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012, 0.016, 0.024, 0.032, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
)  # fmt: skip
STAGE_SECONDS = (0.00005, 0.0001, 0.0002, *REQUEST_SECONDS)
CANDIDATES = (1, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
SCORES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, *(round(0.1 * step, 1) for step in range(1, 11)))


@dataclass(frozen=True)
class Families:
    """Every metric, by what it counts."""

    requests: Counter
    refused: Counter
    request_seconds: Histogram
    stage_seconds: Histogram
    candidates: Histogram
    values: Counter
    missing: Counter
    unknown: Counter
    scores: Histogram
    queue: Gauge
    model: Gauge
    swaps: Counter
    store_missed: Counter
    store_timeouts: Counter
    dropped: Counter


@cache
def families() -> Families:
    """This process's metrics, registered by the first call."""
    from prometheus_client import Counter, Gauge, Histogram

    _forget_killed_workers()
    of_model = ("version", "role")
    return Families(
        requests=Counter("masknet_requests", "Requests by route and status", ("route", "status", *of_model)),
        refused=Counter("masknet_refused", "Requests that got an error, by its code", ("route", "status", "code")),
        request_seconds=Histogram(
            "masknet_request_seconds", "From arrival to answer", ("route", *of_model), buckets=REQUEST_SECONDS
        ),
        stage_seconds=Histogram(
            "masknet_stage_seconds", "Parts of a request", ("stage", *of_model), buckets=STAGE_SECONDS
        ),
        candidates=Histogram(
            "masknet_candidates", "Candidates, or rows, of a request", ("route", *of_model), buckets=CANDIDATES
        ),
        values=Counter("masknet_values", "Encoded values; a context's count once a request", ("field", *of_model)),
        missing=Counter("masknet_missing", "Values that were missing", ("field", *of_model)),
        unknown=Counter("masknet_unknown", "Ids that training has never seen", ("field", *of_model)),
        scores=Histogram("masknet_score", "Served scores", of_model, buckets=SCORES),
        queue=Gauge("masknet_queue", "Requests that wait for their turn", multiprocess_mode="livesum"),
        model=Gauge(
            "masknet_model_info",
            "Workers with the model in this role",
            ("name", *of_model),
            multiprocess_mode="livesum",
        ),
        swaps=Counter("masknet_swaps", "Changes of model by outcome", ("outcome",)),
        store_missed=Counter("masknet_store_missed", "Keys that the feature store did not have, or not in time"),
        store_timeouts=Counter("masknet_store_timeouts", "Times that the feature store did not answer in time"),
        dropped=Counter("masknet_dropped", "Left out under load: requests of the log, shadow scorings", ("what",)),
    )


def _forget_killed_workers() -> None:
    """Remove what live gauges say of processes that could not do so at their end: it would count for good."""
    from prometheus_client.multiprocess import mark_process_dead

    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    for file in Path(folder).glob("gauge_live*_*.db") if folder else ():
        pid = int(file.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid)  # type: ignore[no-untyped-call]
        except PermissionError:  # it runs
            pass
