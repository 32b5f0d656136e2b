"""SIGTERM to a real service: not ready, answering for a while, everything in flight answered, and an end in time."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.conftest import ITEMS
from tests.serving.running import ROOT, Service

pytestmark = pytest.mark.long

DRAIN = 8.0
BODY: dict[str, Any] = {"context": {"user": "ann"}, "candidates": {"item": list(range(ITEMS)) * 80}}


class Callers:
    """Threads that rank until they are stopped; a connection for each request, as from new clients."""

    def __init__(self, uri: str) -> None:
        self.uri, self.statuses, self.stop = uri, list[int](), threading.Event()
        self.threads = [threading.Thread(target=self._call) for _ in range(3)]
        for thread in self.threads:
            thread.start()

    def _call(self) -> None:
        while not self.stop.is_set():
            self.statuses.append(httpx.post(f"{self.uri}/rank", json=BODY, timeout=30).status_code)

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


@pytest.mark.parametrize("workers", [1, 2])
def test_requests_go_on_while_load_balancers_notice(small_bundle: Path, tmp_path: Path, workers: int) -> None:
    options = ("--set", f"limits.drain_seconds={DRAIN}", "--set", f"workers={workers}")
    with Service(tmp_path, str(small_bundle), *options) as service:
        _drain_under_load(service)


def _drain_under_load(service: Service) -> None:
    callers = Callers(service.uri)
    time.sleep(0.5)
    start = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    time.sleep(1)
    unready = httpx.get(f"{service.uri}/readyz")
    assert (unready.status_code, unready.json()["error"]["code"]) == (503, "not_ready")
    assert httpx.get(f"{service.uri}/livez").status_code == 200
    before = len(callers.statuses)
    time.sleep(1)
    service.process.send_signal(signal.SIGTERM)  # again, which shortens nothing
    callers.end()
    assert len(callers.statuses) > before
    assert set(callers.statuses) == {200}
    assert service.process.wait(30) == 0
    assert DRAIN < time.monotonic() - start < DRAIN + 15
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{service.uri}/livez")


def test_what_is_in_flight_at_the_end_is_answered(small_bundle: Path, tmp_path: Path) -> None:
    """A body that is still on its way when connections are refused, and arrives after."""
    with Service(tmp_path, str(small_bundle), "--set", "limits.drain_seconds=0") as service:
        host, _, port = service.uri.removeprefix("http://").partition(":")
        body = b'{"context": {"user": "ann"}, "candidates": {"item": [1, 2]}}'
        head = (
            f"POST /rank HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(head.encode() + body[:20])
            time.sleep(0.5)
            service.process.send_signal(signal.SIGTERM)
            service.wait_for(lambda: "finishing what is in flight" in service.told())
            connection.sendall(body[20:])
            answer = b"".join(iter(lambda: connection.recv(1000), b""))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b'"items"' in answer
        assert service.process.wait(30) == 0


def test_a_client_that_never_finishes_holds_nothing_up(small_bundle: Path, tmp_path: Path) -> None:
    """Its body is given up as at any other time, a connection that only waits is closed; an orderly end."""
    options = ("--set", "limits.drain_seconds=0", "--set", "limits.body_seconds=2")
    with Service(tmp_path, str(small_bundle), *options) as service:
        host, _, port = service.uri.removeprefix("http://").partition(":")
        with (
            socket.create_connection((host, int(port)), timeout=30) as stalled,
            socket.create_connection((host, int(port)), timeout=30) as idle,
        ):
            idle.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert idle.recv(1000).startswith(b"HTTP/1.1 200 ")
            stalled.sendall(
                b"POST /rank HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 60\r\n\r\n{"
            )
            service.wait_for(lambda: httpx.post(f"{service.uri}/rank", json=BODY).status_code == 200)
            service.process.send_signal(signal.SIGTERM)
            answer = b"".join(iter(lambda: stalled.recv(1000), b""))
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b'"code":"body_too_slow"' in answer
            assert b"HTTP/1.1" not in b"".join(iter(lambda: idle.recv(1000), b""))
            assert service.process.wait(30) == 0


GIVES_UP = """
import asyncio, signal
from serving.api.drain import drain_on_sigterm

async def main():
    signal.signal(signal.SIGTERM, lambda *_: None)  # a server that does not end
    drain_on_sigterm(lambda: print("begun", flush=True), 0.2, 0.3)
    print("ready", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_server_that_does_not_end_is_ended() -> None:
    command = [sys.executable, "-W", "ignore", "-c", GIVES_UP]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, "begun\n")
    assert "did not finish in time" in error


def test_a_signal_to_the_whole_group_is_the_same(small_bundle: Path, tmp_path: Path) -> None:
    """As systemd sends it: to every process, whereupon the launcher sends it to its workers once more."""
    import psutil

    with Service(tmp_path, str(small_bundle), "--set", f"limits.drain_seconds={DRAIN}") as service:
        start = time.monotonic()
        parent = psutil.Process(service.process.pid)
        for process in [parent, *parent.children(recursive=True)]:
            os.kill(process.pid, signal.SIGTERM)
        time.sleep(1)
        assert httpx.post(f"{service.uri}/rank", json=BODY, timeout=30).status_code == 200
        assert service.process.wait(30) == 0
        assert time.monotonic() - start > DRAIN
