"""A service that runs for the length of a block, for the demo: a real process, a real port, real HTTP."""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from training.errors import Failure

START_SECONDS = 90.0
STOP_SECONDS = 20.0


@contextmanager
def running_service(model: str) -> Iterator[str]:
    """Start `masknet serve MODEL` on a free port, wait until it is ready, yield its address, stop it."""
    port = _free_port()
    command = [sys.executable, "-m", "training", "serve", model, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}/readyz", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST JSON and return the JSON answered; Failure with the answer for any status but 200."""
    answer = httpx.post(url, json=body, timeout=30.0)
    if answer.status_code != 200:
        raise Failure(f"{url} answered {answer.status_code}: {answer.text[:500]}")
    result: dict[str, Any] = answer.json()
    return result


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx.get(url, timeout=5.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    log.seek(0)
    raise Failure(f"the service did not start:\n{log.read().decode(errors='replace')[-2000:]}")
