"""Where the time of steps goes, by the host's clock: on CUDA, where kernels run on, that of starting them."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds by stage, gathered over steps. Stages are not nested."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Time a block as part of a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - started

    def taken(self, steps: int) -> dict[str, float]:
        """Milliseconds per step of each stage in the last so many steps, as ms_STAGE; begins anew."""
        found = {f"ms_{stage}": 1e3 * seconds / steps for stage, seconds in self._seconds.items()}
        self._seconds.clear()
        return found
