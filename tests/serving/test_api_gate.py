"""Tokens, request ids and the one body of errors, around an application that knows of none."""

from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import Scope
from starlette.websockets import WebSocket, WebSocketDisconnect

from features.errors import InputError
from serving.api.auth import Tokens
from serving.api.errors import ApiError
from serving.api.gate import Gate, request_id_of

ERROR = {"code", "message", "location"}


def client(told: Callable[[Scope, ApiError], None] = lambda scope, error: None, **environment: str) -> TestClient:
    async def page(request: Request) -> Response:
        return PlainTextResponse(request_id_of(request.scope))

    async def unready(request: Request) -> Response:
        return PlainTextResponse("Service is not ready because .__is_ready__() returns False.", 503)

    async def talk(socket: WebSocket) -> None:
        await socket.accept()

    routes = [Route(path, page) for path in ("/", "/rank", "/livez", "/metrics")] + [Route("/readyz", unready)]
    return TestClient(
        Gate(Starlette(routes=[*routes, WebSocketRoute("/talk", talk)]), Tokens.of(environment), told=told)
    )


def test_without_tokens_everything_is_open() -> None:
    assert {client().get(path).status_code for path in ("/", "/rank", "/livez", "/metrics")} == {200}


@pytest.mark.parametrize("value", ["Bearer first", "bearer second", "Bearer  third"])
def test_each_of_the_tokens_opens(value: str) -> None:
    guarded = client(MASKNET_TOKENS="first, second\nthird")
    assert guarded.get("/rank", headers={"authorization": value}).status_code == 200


@pytest.mark.parametrize(
    "value", [None, "", "first", "Bearer", "Bearer ", "Bearer fir", "Basic first", "Bearer first2"]
)
def test_anything_else_is_401(value: str | None) -> None:
    guarded = client(MASKNET_TOKENS="first,second")
    for path in ("/rank", "/", "/nowhere", "/livez/../rank", "/LIVEZ"):
        answer = guarded.get(path, headers={} if value is None else {"authorization": value})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert set(answer.json()["error"]) == ERROR
        assert answer.headers["x-request-id"]
    assert guarded.get("/livez").status_code == 200
    assert guarded.get("/readyz").status_code == 503
    assert guarded.get("/metrics").status_code == 200


def test_who_is_sent_away_is_told_of() -> None:
    told: list[tuple[str, int, str]] = []
    guarded = client(
        lambda scope, error: told.append((scope["path"], error.status, error.code)), MASKNET_TOKENS="first"
    )
    guarded.get("/rank", headers={"authorization": "Bearer guess"})
    guarded.get("/rank", headers={"authorization": "Bearer first"})
    guarded.get("/livez")
    guarded.get("/nowhere")
    assert told == [("/rank", 401, "unauthorized"), ("/nowhere", 401, "unauthorized")]


@pytest.mark.parametrize("tokens", [{}, {"MASKNET_TOKENS": "first"}])
def test_websockets_are_refused_at_once(tokens: dict[str, str]) -> None:
    """With or without a token: there is nothing that speaks it."""
    for headers in ({}, {"authorization": "Bearer first"}):
        with pytest.raises(WebSocketDisconnect) as error, client(**tokens).websocket_connect("/talk", headers=headers):
            pass
        assert error.value.code == 1000


def test_metrics_may_need_a_token_too() -> None:
    guarded = client(MASKNET_TOKENS="first", MASKNET_PROTECT_METRICS="1")
    assert guarded.get("/metrics").status_code == 401
    assert guarded.get("/metrics", headers={"authorization": "Bearer first"}).status_code == 200


def test_tokens_from_a_mounted_file(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("from-a-file\n")
    guarded = client(MASKNET_TOKENS_FILE=str(tmp_path / "tokens"))
    assert guarded.get("/rank", headers={"authorization": "Bearer from-a-file"}).status_code == 200
    assert guarded.get("/rank").status_code == 401


def test_nothing_is_opened_by_mistake(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(InputError, match="MASKNET_TOKENS is set, and holds no token"):
        Tokens.of({"MASKNET_TOKENS": " , "})
    with pytest.raises(InputError, match="MASKNET_TOKENS_FILE is set, and holds no token"):
        Tokens.of({"MASKNET_TOKENS_FILE": str(tmp_path / "empty")})
    with pytest.raises(InputError, match="MASKNET_TOKENS_FILE is set, and holds no token"):
        Tokens.of({"MASKNET_TOKENS_FILE": ""})
    with pytest.raises(InputError, match="cannot be read: No such file"):
        Tokens.of({"MASKNET_TOKENS_FILE": str(tmp_path / "none")})


def test_a_request_keeps_its_id_or_gets_one() -> None:
    answer = client().get("/rank", headers={"x-request-id": "a1:b/c-D_9.="})
    assert answer.text == answer.headers["x-request-id"] == "a1:b/c-D_9.="
    for bad in ("", "two words", "é".encode().decode("latin-1"), "x" * 129, "<script>"):
        made = client().get("/rank", headers={b"x-request-id": bad.encode("latin-1")})
        assert made.text == made.headers["x-request-id"]
        assert len(made.text) == 32


def test_errors_of_others_get_the_one_body() -> None:
    unready = client().get("/readyz")
    assert (unready.status_code, unready.json()["error"]["code"]) == (503, "not_ready")
    assert unready.headers["retry-after"] == "1"
    assert "__is_ready__" not in unready.text
    missing = client().get("/nowhere")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = client().post("/livez")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert set(wrong.headers["allow"].split(", ")) == {"GET", "HEAD"}
    head = client().head("/nowhere")
    assert (head.status_code, head.content) == (404, b"")
