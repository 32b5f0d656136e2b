"""The contract over the wire for every kind of field, by both routes, in rows, columns and streams."""

import gzip
import json
import math
import pickle
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from serving.bundle import load_bundle
from tests.serving.every_kind import CANDIDATES, CONTEXT, PLAIN, TIME, in_rows, rows_at
from tests.serving.running import ARROW, Service, checked, stream

pytestmark = pytest.mark.long

JSON = "application/json"
ROUTES = [("/rank", "candidates"), ("/predict", "rows")]
both = pytest.mark.parametrize(("path", "place"), ROUTES)
WHOLE = {name: [row[name] for row in rows_at(TIME)] for name in rows_at(TIME)[0]}
STREAMED = {"/rank": PLAIN, "/predict": WHOLE | PLAIN}


@pytest.fixture(scope="module")
def http(every_service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=every_service.uri, timeout=30) as client:
        yield client


def post(http: httpx.Client, path: str, body: Any, kind: str = JSON, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post(path, content=content, headers={"content-type": kind, **headers})


def body_of(path: str, columns: Any, **rest: Any) -> dict[str, Any]:
    """A body of either route; `columns` may be rows."""
    return {"context": CONTEXT, "candidates": columns, **rest} if path == "/rank" else {"rows": columns, **rest}


def columns_for(path: str) -> dict[str, list[Any]]:
    return CANDIDATES if path == "/rank" else WHOLE


# Field, its value in the second row, code, and what follows the value's place in the location.
VALUES: list[tuple[str, Any, str, str]] = [
    ("price", "1", "wrong_type", ""),
    ("price", True, "wrong_type", ""),
    ("price", [1], "wrong_type", ""),
    ("income", {}, "wrong_type", ""),
    ("clicks", "many", "wrong_type", ""),
    ("share", "", "wrong_type", ""),
    ("item", 1.5, "wrong_type", ""),
    ("item", False, "wrong_type", ""),
    ("item", ["x"], "wrong_type", ""),
    ("item", 2**64, "wrong_type", ""),
    ("item", "a\0b", "bad_value", ""),
    ("item", "x" * 4097, "bad_value", ""),
    ("slot", -1, "bad_value", ""),
    ("slot", "two", "bad_value", ""),
    ("slot", 10**18, "bad_value", ""),
    ("slot", 2.0, "wrong_type", ""),
    ("liked", "ann", "wrong_type", ""),
    ("liked", ["ann", None], "wrong_type", "[1]"),
    ("liked", ["ann", 2.5], "wrong_type", "[1]"),
    ("liked", [["ann"]], "wrong_type", "[0]"),
    ("codes", [3, "x"], "bad_value", "[1]"),
    ("codes", [3, -1], "bad_value", "[1]"),
    ("genres", 5, "wrong_type", ""),
    ("genres", ["war", "dra\0ma"], "bad_value", ""),
]


@both
@pytest.mark.parametrize(("field", "value", "code", "item"), VALUES, ids=lambda value: str(value)[:20])
def test_a_wrong_value(http: httpx.Client, path: str, place: str, field: str, value: Any, code: str, item: str) -> None:
    columns = columns_for(path)
    columns = columns | {field: [columns[field][0], value, columns[field][2]]}
    checked(post(http, path, body_of(path, columns)), 422, code, f"{place}.{field}[1]{item}")
    checked(post(http, path, body_of(path, in_rows(columns))), 422, code, f"{place}[1].{field}{item}")


@both
@pytest.mark.parametrize("number", ["1e25", "-1e39", "1e300", str(10**30)])
def test_a_number_too_large_to_be_scored(http: httpx.Client, path: str, place: str, number: str) -> None:
    columns = columns_for(path) | {"price": [1.0, json.loads(number), 2.0]}
    for form in (columns, in_rows(columns)):
        checked(post(http, path, body_of(path, form)), 422, "bad_value", f"{place}[1]")
    streamed = stream(STREAMED[path] | {"price": [1.0, float(number), 2.0]}, _rest(path))
    checked(post(http, path, streamed, ARROW), 422, "bad_value", f"{place}[1]")


@both
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "0x1", "01", ".5"])
def test_what_is_no_json_number(http: httpx.Client, path: str, place: str, number: str) -> None:
    body = json.dumps(body_of(path, columns_for(path) | {"price": [1.0, 12345, 2.0]})).replace("12345", number)
    checked(post(http, path, body.encode()), 400, "not_json")


@both
@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xef\xbb\xbf{}", b'{"rows": "\xff"}', pickle.dumps({})])
def test_what_is_no_json(http: httpx.Client, path: str, place: str, body: bytes) -> None:
    checked(post(http, path, body), 400, "not_json")
    checked(post(http, path, body, ARROW), 400, "not_arrow")


@both
def test_a_body_of_another_form(http: httpx.Client, path: str, place: str) -> None:
    columns = columns_for(path)
    first, second, third = in_rows(columns)
    lacking = {name: values for name, values in columns.items() if name != "share"}

    def wrong(body: Any, code: str, location: str | None) -> None:
        checked(post(http, path, body), 422, code, location)

    def wrong_rows(rows: Any, code: str, location: str | None) -> None:
        wrong(body_of(path, rows), code, location)

    wrong([], "wrong_type", None)
    wrong({}, "missing_key", place)
    wrong(body_of(path, columns, limit=1), "unknown_key", "limit")
    for other in (None, 1, "x"):
        wrong_rows(other, "wrong_type", place)
    wrong_rows({}, "no_rows", place)
    wrong_rows([], "no_rows", place)
    wrong_rows([{}, {}], "no_rows", place)
    wrong_rows({name: [] for name in columns}, "no_rows", place)
    wrong_rows(lacking, "missing_field", f"{place}.share")
    wrong_rows(in_rows(lacking), "missing_field", f"{place}.share")
    wrong_rows(columns | {"shoe": [1, 2, 3]}, "unknown_field", f"{place}.shoe")
    wrong_rows([first, second | {"shoe": 1}, third], "unknown_field", f"{place}[1].shoe")
    for unsent in ("position", "delay", "hour", "user_x_genre"):
        wrong_rows(columns | {unsent: [1, 2, 3]}, "unknown_field", f"{place}.{unsent}")
    wrong_rows(columns | {"share": [1, 2]}, "ragged_columns", f"{place}.share")
    wrong_rows(columns | {"share": [1, 2, 3, 4]}, "ragged_columns", f"{place}.price")
    wrong_rows(columns | {"share": 1}, "wrong_type", f"{place}.share")
    wrong_rows([first, None, third], "wrong_type", f"{place}[1]")
    for absent in ("price", "share"):
        less = {name: value for name, value in second.items() if name != absent}
        wrong_rows([first, less, third], "missing_field", f"{place}[1].{absent}")
        less = {name: value for name, value in first.items() if name != absent}
        wrong_rows([less, second, third], "missing_field", f"{place}[0].{absent}")


def test_a_wrong_context_or_rest(http: httpx.Client) -> None:
    def wrong(code: str, location: str, **change: Any) -> None:
        checked(post(http, "/rank", {"context": CONTEXT, "candidates": CANDIDATES, **change}), 422, code, location)
        rest = {"context": CONTEXT, **change}
        checked(post(http, "/rank", stream(PLAIN, rest), ARROW), 422, code, location)

    for context in (None, [], "x"):
        wrong("wrong_type", "context", context=context)
    wrong("wrong_type", "context.age", context=CONTEXT | {"age": "33"})
    wrong("wrong_type", "context.user", context=CONTEXT | {"user": 1.5})
    wrong("bad_value", "context.user", context=CONTEXT | {"user": "a\0b"})
    wrong("bad_value", "context.user", context=CONTEXT | {"user": "x" * 4097})
    wrong("unknown_field", "context.shoe", context=CONTEXT | {"shoe": 1})
    wrong("unknown_field", "context.hour", context=CONTEXT | {"hour": 1})
    wrong("missing_field", "candidates.age", context={"user": "bob"})
    wrong("field_twice", "candidates.price", context=CONTEXT | {"price": 1})
    for top_k in (0, -1, 1.5, "1", None, True):
        wrong("wrong_type", "top_k", top_k=top_k)
    for time in (None, True, [], {}):
        wrong("wrong_type", "time", time=time)
    for time in ("", "soon", 1e300, -1e12, "2024-13-01"):
        wrong("bad_value", "time", time=time)


def test_times_of_rows(http: httpx.Client) -> None:
    for value, code in [(True, "wrong_type"), ([], "wrong_type"), ("soon", "bad_value"), (1e300, "bad_value")]:
        seen = [TIME, value, None]
        checked(post(http, "/predict", {"rows": WHOLE | {"seen": seen}}), 422, code, "rows.seen[1]")
        rows = [row | {"seen": time} for row, time in zip(in_rows(WHOLE), seen, strict=True)]
        checked(post(http, "/predict", {"rows": rows}), 422, code, "rows[1].seen")
    missing = [post(http, "/predict", {"rows": rows_at(time)}).json()["scores"] for time in (None, "")]
    assert missing[0] == missing[1]
    checked(post(http, "/predict", stream(STREAMED["/predict"] | {"seen": ["0", "soon", None]}, {}), ARROW),
            422, "bad_value", "rows.seen[1]")  # fmt: skip


def _rest(path: str) -> dict[str, Any]:
    return {"context": CONTEXT} if path == "/rank" else {}


@both
def test_a_wrong_stream(http: httpx.Client, path: str, place: str) -> None:
    good, rest = STREAMED[path], _rest(path)

    def wrong(status: int, code: str, location: str | None, body: bytes) -> None:
        checked(post(http, path, body, ARROW), status, code, location)

    for number in (math.nan, math.inf, -math.inf):
        wrong(422, "wrong_type", f"{place}.price[1]", stream(good | {"price": [1.0, number, None]}, rest))
    wrong(422, "wrong_type", f"{place}.price", stream(good | {"price": ["1", "2", "3"]}, rest))
    wrong(422, "wrong_type", f"{place}.item", stream(good | {"item": [1.5, 2.0, 3.0]}, rest))
    wrong(422, "bad_value", f"{place}.item[1]", stream(good | {"item": ["a", "b\0", "c"]}, rest))
    wrong(422, "bad_value", f"{place}.slot[2]", stream(good | {"slot": [1, 2, -3]}, rest))
    wrong(422, "wrong_type", f"{place}.liked[1][1]", stream(good | {"liked": [["a"], ["b", None], []]}, rest))
    wrong(422, "bad_value", f"{place}.codes[2][0]", stream(good | {"codes": [["1"], [], ["x"]]}, rest))
    wrong(422, "wrong_type", f"{place}.liked", stream(good | {"liked": ["a", "b", "c"]}, rest))
    wrong(422, "wrong_type", f"{place}.item", stream(good | {"item": pa.array([b"a"] * 3)}, rest))
    wrong(422, "unknown_field", f"{place}.shoe", stream(good | {"shoe": [1, 2, 3]}, rest))
    lacking = {name: values for name, values in good.items() if name != "share"}
    wrong(422, "missing_field", f"{place}.share", stream(lacking, rest))
    wrong(422, "no_rows", place, stream({name: pa.array(values)[:0] for name, values in good.items()}, rest))
    wrong(422, "unknown_key", "limit", stream(good, rest | {"limit": 1}))
    for compression in ("lz4", "zstd"):
        wrong(415, "compressed", None, stream(good, rest, compression=compression))
    wrong(400, "not_arrow", None, stream(good, rest)[:-50])
    many = {name: pa.array(values).take(pa.array(np.zeros(5001, np.int64))) for name, values in good.items()}
    wrong(413, "too_many_rows", place, stream(many, rest))
    checked(post(http, path, stream(good, rest), JSON), 400, "not_json")


@both
def test_limits_and_content(http: httpx.Client, path: str, place: str) -> None:
    columns = columns_for(path)
    for count, status in ((5000, 200), (5001, 413)):
        many = {name: [values[0]] * count for name, values in columns.items()}
        for form in (many, in_rows(many)):
            answer = post(http, path, body_of(path, form))
            assert answer.status_code == status
            if status == 413:
                checked(answer, 413, "too_many_rows", place)
    body = json.dumps(body_of(path, columns)).encode()
    for kind in (JSON, ARROW):
        checked(post(http, path, b" " * (16 * 2**20 + 1), kind), 413, "body_too_large")
        checked(post(http, path, gzip.compress(body), kind, **{"content-encoding": "gzip"}), 415, "content_encoding")
    for kind in ("application/x-python-pickle", "application/octet-stream", "text/json", ""):
        checked(post(http, path, pickle.dumps({}), kind), 415, "content_type")
    answer = http.get(path)
    checked(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def test_good_requests_are_the_scorers_after_all_that(every_service: Service, http: httpx.Client) -> None:
    scorer = load_bundle(every_service.log.parent / "bundle").scorer
    expected = scorer.score([row | {"seen": pd.Timestamp("2024-05-05 16:30")} for row in in_rows(PLAIN | _shared())])
    close = {"rel": 0, "abs": 1e-6}
    for form in (CANDIDATES, in_rows(CANDIDATES)):
        ranked = post(http, "/rank", {"context": CONTEXT, "candidates": form, "time": TIME}).json()["items"]
        assert {item["index"]: item["score"] for item in ranked} == pytest.approx(dict(enumerate(expected)), **close)
    for body, kind in [({"rows": WHOLE}, JSON), ({"rows": rows_at(TIME)}, JSON)]:
        assert post(http, "/predict", body, kind).json()["scores"] == pytest.approx(expected.tolist(), **close)
    for path, rest in (("/rank", {"context": CONTEXT, "time": TIME}), ("/predict", {})):
        table = pa.ipc.open_stream(
            post(http, path, stream(STREAMED[path], rest), ARROW, accept=ARROW).content
        ).read_all()
        scores = table["score"].to_numpy()
        order = table["index"].to_numpy() if path == "/rank" else np.arange(3)
        np.testing.assert_allclose(scores, expected[order], rtol=0, atol=1e-6)
    assert every_service.metric("masknet_refused_total", 'status="500"') == 0
    assert "Traceback" not in every_service.told()


def _shared() -> dict[str, list[Any]]:
    return {name: [value] * 3 for name, value in CONTEXT.items()}
