"""Counts that a request adds to at the cost of an addition, and that a thread hands on to Prometheus's metrics.

A metric's own `inc` takes 1 to 2 µs, since over workers it writes to a file's page; a request of 40 fields and 500
scores would pay for hundreds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from prometheus_client import Counter, Histogram

Labels = tuple[str, ...]


class CounterTally:
    """What a counter is to rise by. Whoever adds holds the lock."""

    def __init__(self, family: Counter) -> None:
        self._family, self._counts = family, dict[Labels, float]()

    def add(self, labels: Labels, count: float = 1) -> None:
        """Count."""
        self._counts[labels] = self._counts.get(labels, 0) + count

    def add_all(self, counts: Mapping[str, int], labels: Labels) -> None:
        """Count by a first label, each with the same others."""
        own = self._counts
        for name, count in counts.items():
            key = (name, *labels)
            own[key] = own.get(key, 0) + count

    def hand_on(self, lock: Lock) -> None:
        """Add to the metric what was counted, and start again at 0."""
        with lock:
            taken, self._counts = self._counts, {}
        for labels, count in taken.items():
            self._family.labels(*labels).inc(count)


class HistogramTally:
    """What a histogram is to observe, already counted by its buckets. Whoever adds holds the lock."""

    def __init__(self, family: Histogram, bounds: tuple[float, ...]) -> None:
        self._family, self._bounds = family, bounds
        self._bounds_K = np.array(bounds)
        self._found = dict[Labels, tuple[list[int], list[float]]]()  # counts by bucket, and the sum alone in a list

    def add(self, labels: Labels, value: float) -> None:
        """Count one observation."""
        counts, total = self._of(labels)
        counts[bisect_left(self._bounds, value)] += 1
        total[0] += value

    def add_all(self, labels: Labels, value_N: npt.NDArray[np.floating]) -> None:
        """Count many."""
        counts, total = self._of(labels)
        count_K = np.bincount(np.searchsorted(self._bounds_K, value_N), minlength=len(counts))
        counts[:] = [own + more for own, more in zip(counts, count_K.tolist(), strict=True)]
        total[0] += float(value_N.sum(dtype=np.float64))

    def hand_on(self, lock: Lock) -> None:
        """Add to the metric what was counted, and start again at 0."""
        with lock:
            taken, self._found = self._found, {}
        for labels, (counts, total) in taken.items():
            child = self._family.labels(*labels)
            child._sum.inc(total[0])  # the client has no public way to observe a number of values at once
            for bucket, count in zip(child._buckets, counts, strict=True):
                if count:
                    bucket.inc(count)

    def _of(self, labels: Labels) -> tuple[list[int], list[float]]:
        found = self._found.get(labels)
        if found is None:
            found = self._found[labels] = ([0] * (len(self._bounds) + 1), [0.0])
        return found
