"""A real service under more load than it can do: what it takes on is answered soon, the rest is refused at once."""

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.serving.conftest import ITEMS
from tests.serving.running import Service

pytestmark = pytest.mark.long

BODY: dict[str, Any] = {"context": {"user": "ann"}, "candidates": {"item": (list(range(ITEMS)) * 84)[:5000]}}
QUEUE = 4


async def timed(client: httpx.AsyncClient, uri: str) -> tuple[httpx.Response, float]:
    start = time.perf_counter()
    answer = await client.post(f"{uri}/rank", json=BODY)
    return answer, time.perf_counter() - start


async def open_loop(uri: str, rate: float, count: int) -> list[tuple[httpx.Response, float]]:
    """Requests at random moments, `rate` a second on average, whatever becomes of those before."""
    random = np.random.default_rng(1)
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=200)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        tasks = []
        for pause in random.exponential(1 / rate, count):
            tasks.append(asyncio.ensure_future(timed(client, uri)))
            await asyncio.sleep(pause)
        return await asyncio.gather(*tasks)


def test_at_twice_the_load_some_are_answered_soon_and_the_others_at_once(small_bundle: Path, tmp_path: Path) -> None:
    options = ("--set", f"limits.queue={QUEUE}", "--set", "limits.drain_seconds=0")
    with Service(tmp_path, str(small_bundle), *options) as service:

        async def alone() -> list[float]:
            async with httpx.AsyncClient(timeout=60) as client:
                return [(await timed(client, service.uri))[1] for _ in range(60)]

        unloaded = np.array(asyncio.run(alone())[10:])
        found = asyncio.run(open_loop(service.uri, 3 / float(np.median(unloaded)), 400))
        statuses = {answer.status_code for answer, _ in found}
        assert statuses == {200, 429}
        accepted = np.array([seconds for answer, seconds in found if answer.status_code == 200])
        refused = [answer for answer, _ in found if answer.status_code == 429]
        assert len(accepted) > 20
        assert len(refused) > 20
        for answer in refused:
            assert answer.json()["error"]["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) >= 1
        # Its own service time and those of the queue before it; the load generator shares the cores.
        assert np.median(accepted) < (QUEUE + 1) * np.quantile(unloaded, 0.99) * 3
        service.wait_for(lambda: service.metric("masknet_refused", 'code="queue_full"') == len(refused))
        assert service.rank(BODY)["items"]  # and goes on as before


def test_a_deadline_that_cannot_be_kept_is_503(small_bundle: Path, tmp_path: Path) -> None:
    options = ("--set", "limits.deadline_ms=5", "--set", "limits.queue=100", "--set", "limits.drain_seconds=0")
    with Service(tmp_path, str(small_bundle), *options) as service:
        found = asyncio.run(open_loop(service.uri, 2000, 100))
        late = [answer for answer, _ in found if answer.status_code == 503]
        assert late
        for answer in late:
            assert answer.json()["error"]["code"] == "deadline"
            assert int(answer.headers["retry-after"]) >= 1
        assert {answer.status_code for answer, _ in found} <= {200, 429, 503}
        # Health is answered by a worker that computes all the time.
        assert httpx.get(f"{service.uri}/livez").status_code == 200
