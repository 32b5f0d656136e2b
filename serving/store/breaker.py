"""A circuit breaker: what does not answer is asked once in a while, and by one thread alone."""

import threading
import time
from collections.abc import Callable


class Breaker:
    """Closed while all is well. After a failure it opens for `seconds`; then one call is let through to try.

    Args:
        seconds: between tries.
        now: a clock that does not go back.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._now = seconds, now
        self._lock = threading.Lock()
        self._next_try: float | None = None  # None: closed

    def allows(self) -> bool:
        """Whether to make the call; a try that is allowed keeps others away for as long as the breaker opens."""
        with self._lock:
            if self._next_try is None:
                return True
            if self._now() < self._next_try:
                return False
            self._next_try = self._now() + self._seconds
            return True

    def failed(self) -> bool:
        """Open; whether it was closed before."""
        with self._lock:
            was_closed, self._next_try = self._next_try is None, self._now() + self._seconds
            return was_closed

    def worked(self) -> bool:
        """Close; whether it was open before."""
        with self._lock:
            was_open, self._next_try = self._next_try is not None, None
            return was_open
