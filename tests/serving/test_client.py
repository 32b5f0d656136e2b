"""The Python clients against a real service, in JSON and Arrow, sync and async."""

import asyncio
import http.server
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pytest

from serving.bundle import load_bundle
from serving.client import AsyncClient, Client, Form, RankingError
from serving.client_bodies import Call, predict_call, rank_call
from tests.serving.conftest import ITEMS
from tests.serving.running import Service

COLUMNS = {"item": [str(item) for item in range(ITEMS)]}


@pytest.mark.long
@pytest.mark.parametrize("form", ["json", "arrow"])
def test_rankings_and_scores(service: Service, small_bundle: Path, form: Form) -> None:
    rows = {"user": ["ann"] * ITEMS, **COLUMNS}
    expected = load_bundle(small_bundle).scorer.score(rows)
    order = sorted(range(ITEMS), key=lambda i: (-expected[i], i))

    async def same() -> None:
        async with AsyncClient(service.uri, form=form) as client:
            one, other = await asyncio.gather(client.rank({"user": "ann"}, COLUMNS), client.predict(rows))
            assert [item.index for item in one.items] == order[:10]
            assert other.scores == pytest.approx(expected.tolist(), abs=1e-6)
            assert (await client.model())["model"]["name"] == "small"

    with Client(service.uri, form=form) as client:
        as_rows = [{"item": item} for item in COLUMNS["item"]]
        for candidates in (COLUMNS, as_rows, pd.DataFrame(COLUMNS), pa.table(COLUMNS)):
            ranking = client.rank({"user": "ann"}, candidates, top_k=3, time=0, request_id="of-mine")
            assert [item.index for item in ranking.items] == order[:3]
            assert [item.score for item in ranking.items] == pytest.approx(expected[order[:3]].tolist(), abs=1e-6)
            assert (ranking.model.name, ranking.request_id) == ("small", "of-mine")
        assert client.predict(rows).scores == pytest.approx(expected.tolist(), abs=1e-6)
        assert client.model()["model"]["version"] == ranking.model.version
    asyncio.run(same())


@pytest.mark.long
@pytest.mark.parametrize("form", ["json", "arrow"])
def test_refusals(service: Service, form: Form) -> None:
    with Client(service.uri, form=form) as client, pytest.raises(RankingError, match="422 unknown_field") as error:
        client.rank({"user": "ann", "shoe": 42}, COLUMNS)
    assert (error.value.status, error.value.code, error.value.location) == (422, "unknown_field", "context.shoe")
    assert error.value.retry_after is None
    assert len(error.value.request_id) == 32


class Busy(http.server.BaseHTTPRequestHandler):
    """Refuses twice, then answers; keeps the headers that it was sent."""

    seen: list[dict[str, str]]

    def do_GET(self) -> None:
        self.seen.append(dict(self.headers))
        busy = len(self.seen) < 3
        self.send_response(429 if busy else 200)
        if busy:
            self.send_header("Retry-After", "0")
        body = b'{"error": {"code": "queue_full", "message": "m", "location": null}}' if busy else b'{"ok": 1}'
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def busy() -> Iterator[str]:
    Busy.seen = []
    with http.server.HTTPServer(("127.0.0.1", 0), Busy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_busy_service_is_asked_again_as_often_as_allowed(busy: str) -> None:
    with Client(busy, "a-token") as client, pytest.raises(RankingError) as error:
        client.model()
    assert (error.value.status, error.value.code, error.value.retry_after, len(Busy.seen)) == (429, "queue_full", 0, 1)
    assert Busy.seen[0]["authorization"] == "Bearer a-token"
    with Client(busy, retries=2) as client:
        assert client.model() == {"ok": 1}
    assert len(Busy.seen) == 3
    Busy.seen = []

    async def patient() -> None:
        async with AsyncClient(busy, retries=1) as client:
            with pytest.raises(RankingError):
                await client.model()
            assert await client.model() == {"ok": 1}

    asyncio.run(patient())
    assert len(Busy.seen) == 3


WAYS: dict[str, Callable[[list[float]], Any]] = {
    "columns": lambda values: {"price": values},
    "numpy": lambda values: {"price": np.array(values, np.float32)},
    "rows": lambda values: [{"price": value} for value in values],
    "pandas": lambda values: pd.DataFrame({"price": values}),
    "arrow": lambda values: pa.table({"price": pa.chunked_array([values[:1], values[1:]])}),
}


def columns_of(call: Call) -> tuple[list[Any], Any]:
    """The column that a call sends, and the rest of its body."""
    if call.headers["content-type"] == "application/json":
        body = orjson.loads(call.body)
        candidates = body.pop("candidates")
        found = [row["price"] for row in candidates] if isinstance(candidates, list) else candidates["price"]
        return found, body
    table = pa.ipc.open_stream(call.body).read_all()
    return table["price"].to_pylist(), orjson.loads(table.schema.metadata[b"masknet"])


@pytest.mark.parametrize("form", ["json", "arrow"])
@pytest.mark.parametrize("way", WAYS)
def test_nan_is_missing_in_both_forms(form: Form, way: str) -> None:
    call = rank_call(form, {"age": math.nan}, WAYS[way]([1.5, math.nan, 2.0]), 3, None, None)
    assert columns_of(call) == ([1.5, None, 2.0], {"context": {"age": None}, "top_k": 3})


@pytest.mark.parametrize("form", ["json", "arrow"])
@pytest.mark.parametrize("way", WAYS)
def test_infinity_is_refused_in_both_forms(form: Form, way: str) -> None:
    """orjson would write it as null, a missing value, which has another score."""
    infinite = WAYS[way]([1.5, 2.0, -math.inf])
    with pytest.raises(ValueError, match=r"^candidates\.price\[2\] is infinite, which no field takes$"):
        rank_call(form, {}, infinite, 3, None, None)
    with pytest.raises(ValueError, match=r"^rows\.price\[2\] is infinite"):
        predict_call(form, infinite, None)
    for value in (math.inf, np.float32(-np.inf)):
        with pytest.raises(ValueError, match=r"^context\.age is infinite"):
            rank_call(form, {"age": value}, WAYS[way]([1.0, 2.0]), 3, None, None)


def test_what_does_not_speak_our_errors() -> None:
    answer = httpx.Response(502, text="<h1>Bad Gateway</h1>" * 50)
    with pytest.raises(RankingError, match="502 unknown: <h1>Bad") as error:
        RankingError.unless_done(answer)
    assert len(error.value.message) == 200


def test_a_form_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="form is one of json, arrow, not 'arow'"):
        Client("http://localhost", form="arow")  # type: ignore[typeddict-item]
