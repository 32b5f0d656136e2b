"""SIGTERM: not ready at once, but answering for a while, until load balancers have noticed; then the server's own end.

BentoML's workers are uvicorn's servers: at SIGTERM these refuse new connections, finish what is in flight and end.
Here that comes `drain_seconds` later. BentoML's launcher passes SIGTERM on to its workers and waits for them.
"""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

_log = logging.getLogger("bentoml.masknet")


def drain_on_sigterm(begin: Callable[[], None], drain_seconds: float, finish_seconds: float) -> None:
    """Take over SIGTERM in a worker, from its main thread, once its server has put its own handler there.

    Args:
        begin: called at once: readiness goes off.
        drain_seconds: for which requests are answered as before.
        finish_seconds: in which the server then ends; where it does not, since a client never finishes or a thread
            hangs, the process is ended.
    """
    server = signal.getsignal(signal.SIGTERM)
    loop = asyncio.get_running_loop()
    draining = threading.Event()

    def end() -> None:
        _log.info("drained; finishing what is in flight")
        timer = threading.Timer(finish_seconds, _give_up)
        timer.daemon = True
        timer.start()
        if callable(server):
            server(signal.SIGTERM, None)

    def asked(number: int, frame: FrameType | None) -> None:
        if draining.is_set():  # the launcher's signal, and one to the whole group: the same wish
            return
        draining.set()
        begin()
        loop.call_soon_threadsafe(loop.call_later, drain_seconds, end)

    signal.signal(signal.SIGTERM, asked)


def _give_up() -> None:
    _log.error("what was in flight did not finish in time")
    os._exit(1)
