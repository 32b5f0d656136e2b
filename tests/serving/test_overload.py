"""A real service with more requests than it can compute: who waits, in which order, and who is refused meanwhile.

A request computes for as long as the test wants: it fetches a field, and the store answers when it is told to.
"""

import asyncio
import socketserver
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.conftest import ITEMS
from tests.serving.running import Service

pytestmark = pytest.mark.long

QUEUE = 4


class SlowStore(socketserver.ThreadingTCPServer):
    """Speaks Redis's protocol as far as MGET of one key; notes the keys and answers that there is none, once `go`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.seen, self.go = list[str](), threading.Event()


class _Connection(socketserver.StreamRequestHandler):
    server: SlowStore

    def handle(self) -> None:
        while count := self.rfile.readline()[1:]:
            words = [self.rfile.read(int(self.rfile.readline()[1:]) + 2)[:-2].decode() for _ in range(int(count))]
            assert words[0] == "MGET", words
            self.server.seen.append(words[1])
            self.server.go.wait(60)
            self.wfile.write(b"*1\r\n$-1\r\n")


@pytest.fixture
def store() -> Iterator[SlowStore]:
    with SlowStore() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.go.set()
        server.shutdown()
        thread.join()


def options(store: SlowStore, **limits: int) -> list[str]:
    """A field of each row is fetched by its item."""
    url = f"redis://127.0.0.1:{store.server_address[1]}/0"
    keys = {"kind": "redis", "url": url, "key": "item", "fields": "[user]", "timeout_ms": 60_000}
    given = {f"store.{key}": value for key, value in keys.items()}
    given |= {f"limits.{key}": value for key, value in {"drain_seconds": 0, **limits}.items()}
    return [word for key, value in given.items() for word in ("--set", f"{key}={value}")]


def ask(service: Service, item: int) -> httpx.Response:
    return httpx.post(f"{service.uri}/rank", json={"context": {}, "candidates": {"item": [item]}}, timeout=60)


def require_refused(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert int(answer.headers["retry-after"]) >= 1


def test_one_computes_some_wait_in_turn_and_all_others_are_refused_meanwhile(
    small_bundle: Path, store: SlowStore, tmp_path: Path
) -> None:
    words = options(store, queue=QUEUE, deadline_ms=60_000)
    with Service(tmp_path, str(small_bundle), *words) as service, ThreadPoolExecutor(QUEUE + 1) as pool:
        taken: list[Future[httpx.Response]] = [pool.submit(ask, service, 0)]
        service.wait_for(lambda: store.seen == ["0"])
        for item in range(1, QUEUE + 1):
            taken.append(pool.submit(ask, service, item))
            service.wait_for(lambda item=item: service.metric("masknet_queue") == item)
        for item in range(20):  # one that had to wait would never be answered
            require_refused(ask(service, item), 429, "queue_full")
        assert httpx.get(f"{service.uri}/livez").status_code == 200
        assert store.seen == ["0"]
        assert not any(future.done() for future in taken)
        store.go.set()
        assert [future.result().status_code for future in taken] == [200] * (QUEUE + 1)
        assert store.seen == [str(item) for item in range(QUEUE + 1)]
        service.wait_for(lambda: service.metric("masknet_queue") == 0)
        service.wait_for(lambda: service.metric("masknet_refused_total", 'code="queue_full"') == 20)
        assert ask(service, 7).status_code == 200  # and goes on as before


def test_whose_turn_does_not_come_before_the_deadline_is_503_and_never_computed(
    small_bundle: Path, store: SlowStore, tmp_path: Path
) -> None:
    words = options(store, queue=100, deadline_ms=200)
    with Service(tmp_path, str(small_bundle), *words) as service, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, service, 0)
        service.wait_for(lambda: store.seen == ["0"])
        for item in (1, 2):
            require_refused(ask(service, item), 503, "deadline")
        assert not first.done()
        store.go.set()
        assert first.result().status_code == 200  # has begun, and is finished
        assert ask(service, 3).status_code == 200
        assert store.seen == ["0", "3"]


def test_a_crowd_is_answered_or_refused_and_counted(small_bundle: Path, tmp_path: Path) -> None:
    body: dict[str, Any] = {"context": {"user": "ann"}, "candidates": {"item": (list(range(ITEMS)) * 84)[:5000]}}
    words = ("--set", f"limits.queue={QUEUE}", "--set", "limits.drain_seconds=0")
    with Service(tmp_path, str(small_bundle), *words) as service:
        waiting: list[float] = []

        async def crowd() -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=200)) as client:
                asked = [asyncio.ensure_future(client.post(f"{service.uri}/rank", json=body)) for _ in range(200)]
                while not all(task.done() for task in asked):
                    waiting.append(await asyncio.to_thread(service.metric, "masknet_queue"))
                return await asyncio.gather(*asked)

        answers = asyncio.run(crowd())
        found = Counter(answer.status_code for answer in answers)
        assert found.keys() == {200, 429}
        assert max(waiting) <= QUEUE
        for answer in answers:
            if answer.status_code == 429:
                require_refused(answer, 429, "queue_full")
        ranked = [answer.json()["items"] for answer in answers if answer.status_code == 200]
        assert all(items == ranked[0] for items in ranked)
        service.wait_for(lambda: service.metric("masknet_refused_total", 'code="queue_full"') == found[429])
        service.wait_for(lambda: service.metric("masknet_requests_total", 'status="200"') == found[200])
        assert service.rank(body)["items"] == ranked[0]
