"""The HTTP contract of a real service: statuses, bodies and headers as they come over the wire."""

import json
import pickle
import signal
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest

from serving.api.arrow import METADATA
from serving.bundle import load_bundle
from tests.serving.conftest import ITEMS
from tests.serving.running import ARROW, Service, checked, stream

pytestmark = pytest.mark.long

ITEM = list(range(ITEMS))
GOOD: dict[str, Any] = {"context": {"user": "ann"}, "candidates": {"item": ITEM}, "top_k": ITEMS}


def post(service: Service, content: bytes, kind: str = "application/json", **headers: str) -> httpx.Response:
    return httpx.post(f"{service.uri}/rank", content=content, headers={"content-type": kind, **headers}, timeout=30)


def test_scores_are_the_scorers_in_json_and_in_arrow(service: Service, small_bundle: Path) -> None:
    scorer = load_bundle(small_bundle).scorer
    expected = scorer.score({"user": ["ann"] * ITEMS, "item": [str(item) for item in ITEM]})
    ranked = service.rank(GOOD)
    assert [item["index"] for item in ranked["items"]] == sorted(ITEM, key=lambda i: (-expected[i], i))
    assert {item["index"]: item["score"] for item in ranked["items"]} == pytest.approx(
        dict(enumerate(expected)), abs=1e-6
    )
    body = stream({"item": ITEM}, {"context": {"user": "ann"}, "top_k": ITEMS})
    answer = post(service, body, ARROW, accept=ARROW)
    assert (answer.status_code, answer.headers["content-type"]) == (200, ARROW)
    table = pa.ipc.open_stream(answer.content).read_all()
    assert table["index"].to_pylist() == [item["index"] for item in ranked["items"]]
    assert table["score"].to_pylist() == pytest.approx([item["score"] for item in ranked["items"]], abs=1e-7)
    assert json.loads(table.schema.metadata[METADATA]) == {"model": ranked["model"]}
    assert post(service, body, ARROW).json() == ranked  # JSON, where Arrow is not asked for
    rows = {"rows": {"user": ["ann"] * ITEMS, "item": ITEM}}
    scores = httpx.post(f"{service.uri}/predict", json=rows).json()["scores"]
    assert scores == pytest.approx(expected.tolist(), abs=1e-6)


BODIES: list[tuple[bytes, int, str, str | None]] = [
    (b"", 400, "not_json", None),
    (b"{", 400, "not_json", None),
    (b'{"candidates": {"item": [NaN]}}', 400, "not_json", None),
    (b'{"candidates": {"item": [Infinity]}}', 400, "not_json", None),
    (b'{"candidates": {"item": [1e999]}}', 400, "not_json", None),
    (b'{"candidates": {"item": ["\\ud800"]}}', 400, "not_json", None),
    (b'{"candidates": {"item": ["\xff"]}}', 400, "not_json", None),
    (b"[" * 100_000, 400, "not_json", None),
    (b"\xef\xbb\xbf{}", 400, "not_json", None),
    (pickle.dumps({"candidates": []}), 400, "not_json", None),
    (b"[]", 422, "wrong_type", None),
    (b"{}", 422, "missing_key", "candidates"),
    (b'{"candidates": {"item": []}, "context": {"user": "ann"}}', 422, "no_rows", "candidates"),
    (b'{"candidates": [], "context": {"user": "ann"}}', 422, "no_rows", "candidates"),
    (b'{"candidates": {"item": [1]}}', 422, "missing_field", "candidates.user"),
    (b'{"candidates": {"item": [1], "user": ["a", "b"]}}', 422, "ragged_columns", "candidates.item"),
    (b'{"candidates": {"item": [1, 2.5], "user": ["a", "b"]}}', 422, "wrong_type", "candidates.item[1]"),
    (b'{"candidates": {"item": [1, -2], "user": ["a", "b"]}}', 422, "bad_value", "candidates.item[1]"),
    (
        b'{"candidates": {"item": [123456789012345678901234567890], "user": ["a"]}}',
        422,
        "wrong_type",
        "candidates.item[0]",
    ),
    (b'{"candidates": [{"item": 1, "user": true}]}', 422, "wrong_type", "candidates[0].user"),
    (b'{"candidates": [{"item": 1, "user": "a", "x": 1}]}', 422, "unknown_field", "candidates[0].x"),
    (b'{"candidates": {"item": [1]}, "context": {"user": "a", "item": 1}}', 422, "field_twice", "candidates.item"),
    (b'{"candidates": {"item": [1]}, "context": {"user": "a"}, "top_k": 0}', 422, "wrong_type", "top_k"),
    (b'{"candidates": {"item": [1]}, "context": {"user": "a"}, "time": "soon"}', 422, "bad_value", "time"),
    (b'{"candidates": {"item": [1]}, "context": {"user": "a"}, "limit": 1}', 422, "unknown_key", "limit"),
    (b'{"candidates": {"item": [1]}, "context": {"user": "' + b"x" * 5000 + b'"}}', 422, "bad_value", "context.user"),
    (
        json.dumps({"context": {"user": "a"}, "candidates": {"item": [1] * 5001}}).encode(),
        413,
        "too_many_rows",
        "candidates",
    ),
]


@pytest.mark.parametrize(("body", "status", "code", "location"), BODIES, ids=lambda value: str(value)[:40])
def test_every_wrong_body(service: Service, body: bytes, status: int, code: str, location: str | None) -> None:
    checked(post(service, body), status, code, location)


def test_what_is_legal_though_odd(service: Service) -> None:
    twice = b'{"candidates": {"item": [1], "item": [2, 3]}, "context": {"user": 18446744073709551615}}'
    answer = post(service, twice)
    assert [item["index"] for item in answer.json()["items"]] in ([0, 1], [1, 0])  # the last of a key counts
    assert post(service, json.dumps({**GOOD, "candidates": {"item": ITEM * 83}}).encode()).status_code == 200


def test_content_types(service: Service) -> None:
    body = json.dumps(GOOD).encode()
    for kind in ("application/x-python-pickle", "application/octet-stream", "application/x-npy", "text/plain", ""):
        checked(post(service, body, kind), 415, "content_type")
    checked(post(service, body, **{"content-encoding": "gzip"}), 415, "content_encoding")
    assert post(service, body, "Application/JSON; charset=utf-8").status_code == 200
    checked(post(service, body, ARROW), 400, "not_arrow")
    checked(
        post(service, stream({"item": [1.5]}, {"context": {"user": "a"}}), ARROW), 422, "wrong_type", "candidates.item"
    )


def test_routes_and_methods(service: Service) -> None:
    checked(httpx.get(f"{service.uri}/nowhere"), 404, "not_found")
    checked(httpx.get(f"{service.uri}/static_content/nowhere.js"), 404, "not_found")
    for method, path, allowed in [("GET", "/rank", "POST"), ("DELETE", "/model", "GET"), ("POST", "/readyz", "GET")]:
        answer = httpx.request(method, f"{service.uri}{path}")
        checked(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == allowed
    for path in ("/livez", "/readyz", "/healthz", "/metrics", "/docs.json", "/model", "/"):
        assert httpx.get(f"{service.uri}{path}").status_code == 200


def test_a_body_above_the_limit_is_refused_by_its_announced_length(service: Service) -> None:
    """Nothing of the body is sent, and the answer is there."""
    head = b"POST /rank HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99999999\r\n\r\n"
    with _connected(service) as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    checked(post(service, b" " * (16 * 2**20 + 1)), 413, "body_too_large")


def test_a_body_that_comes_too_slowly_is_408(service: Service) -> None:
    head = b"POST /rank HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    with _connected(service) as connection:
        connection.sendall(head)
        start = time.monotonic()
        assert service.rank(GOOD)["items"]  # others are answered meanwhile
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        assert 4 < time.monotonic() - start < 20  # limits.body_seconds is 5


def test_a_client_that_hangs_up_disturbs_nobody(service: Service) -> None:
    for _ in range(5):
        with _connected(service) as connection:
            connection.sendall(
                b"POST /rank HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
            )
    assert service.rank(GOOD)["items"]
    assert "ClientDisconnect" not in service.told()


def test_ids_and_no_values_in_the_log(service: Service) -> None:
    body = {"context": {"user": "a-secret-user"}, "candidates": {"item": ["a-secret-item"]}}
    answer = post(service, json.dumps(body).encode(), **{"x-request-id": "id-of-mine-17"})
    checked(answer, 422, "bad_value", "candidates.item[0]")
    assert answer.headers["x-request-id"] == "id-of-mine-17"
    service.wait_for(lambda: "id-of-mine-17: /rank 422 bad_value" in service.told())
    assert "secret" not in service.told()


def test_model_tells_of_its_engine(service: Service) -> None:
    about = httpx.get(f"{service.uri}/model").json()
    assert {"model", "metrics", "members", "calibration", "engine", "life", "schema"} <= about.keys()
    assert about["engine"]["tables"]["largest_error"] == about["engine"]["largest_difference"] == 0.0
    assert about["life"]["source"] == "folder"


def test_tokens_guard_everything_but_health(small_bundle: Path, tmp_path: Path) -> None:
    options = ("--set", "limits.drain_seconds=0", "--set", "log_requests=true")
    with Service(tmp_path, str(small_bundle), *options, MASKNET_TOKENS="s3cret-a,s3cret-b") as guarded:
        for path in ("/", "/docs.json", "/model", "/schema.json", "/static_content/index.css", "/nowhere"):
            answer = httpx.get(f"{guarded.uri}{path}")
            checked(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        checked(post(guarded, json.dumps(GOOD).encode(), **{"x-request-id": "guess-1"}), 401, "unauthorized")
        guarded.wait_for(lambda: guarded.metric("masknet_refused_total", 'route="/rank"', 'code="unauthorized"') == 1)
        assert guarded.metric("masknet_refused_total", 'status="401"') == 7
        assert "request guess-1: /rank 401 unauthorized" in guarded.told()
        assert httpx.get(f"{guarded.uri}/livez").status_code == httpx.get(f"{guarded.uri}/metrics").status_code == 200
        good = {"authorization": "Bearer s3cret-b"}
        assert post(guarded, json.dumps(GOOD).encode(), **good).status_code == 200
        docs = httpx.get(f"{guarded.uri}/docs.json", headers=good).json()
        assert docs["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
        assert "401" in docs["paths"]["/rank"]["post"]["responses"]
        post(guarded, b'{"candidates": {"item": ["visible"], "user": ["a"]}}', **good)
        guarded.wait_for(lambda: "'visible' is no whole number" in guarded.told())  # as log_requests asks
        assert "s3cret" not in guarded.told()


UPGRADE = (
    b"GET /model HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def test_websockets_are_refused_and_hold_nothing_up(small_bundle: Path, tmp_path: Path) -> None:
    """Nobody would answer them; with them open the process would not end before the service's own time-out."""
    with Service(tmp_path, str(small_bundle), "--set", "limits.drain_seconds=0", MASKNET_TOKENS="s3cret") as served:
        sockets = [_connected(served) for _ in range(4)]
        for connection in sockets:
            connection.sendall(UPGRADE)
            assert connection.recv(100).startswith(b"HTTP/1.1 403 ")
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(60) == 0
        for connection in sockets:
            connection.close()


def _connected(service: Service) -> socket.socket:
    host, _, port = service.uri.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=30)
