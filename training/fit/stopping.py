"""Signals that ask training to stop: it goes on to the next point where nothing is lost."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ASKING = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self._asked = False

    def was_asked(self) -> bool:
        """Whether a signal came."""
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # a person who asks twice does not want to wait
        self._asked = True


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """For the length of a block SIGTERM and SIGINT only ask; a second SIGINT interrupts. For the main thread."""
    request = StopRequest()
    before = {number: signal.signal(number, request._ask) for number in _ASKING}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
