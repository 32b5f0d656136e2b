"""The largest rate that a server stands, by bisection."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

LIMIT_MS = 50.0  # for the 99th percentile


@dataclass
class Search:
    """Rates between 0 and `high`; a step halves what is left. `p99_ms` is that of `low`, the largest rate that held."""

    high: float
    low: float = 0.0
    p99_ms: float | None = None
    _found: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """What to try next, requests per second."""
        return (self.low + self.high) / 2

    def add(self, p99_ms: float) -> None:
        """A run's 99th percentile at `rate`, infinite where requests failed."""
        self._found.append(p99_ms)

    def step(self) -> None:
        """Decide by the median of the runs: what else the machine does spoils one of them."""
        median = statistics.median(self._found)
        if median < LIMIT_MS:
            self.low, self.p99_ms = self.rate, median
        else:
            self.high = self.rate
        self._found = []


def p99(milliseconds: Sequence[float], failures: int, overrun: bool) -> float:
    """Of a run's requests, milliseconds; a failed one counts as one that never ends; no requests show nothing."""
    if overrun or not len(milliseconds) + failures:
        return math.inf
    ended = [*sorted(milliseconds), *[math.inf] * failures]
    return ended[math.ceil(0.99 * len(ended)) - 1]
