"""What every request passes, whoever answers it: its id, the bearer token, and the one body of errors."""

import re
import uuid
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.auth import Tokens
from serving.api.codes import CODES
from serving.api.errors import ApiError

ID_HEADER = b"x-request-id"
_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_KEY = "masknet.request_id"
_CODES = {404: "not_found", 405: "method_not_allowed", 503: "not_ready"}


class Gate:
    """Around all of a service, the pages of BentoML included.

    Args:
        app: the service.
        tokens: whoever sends one of these may pass.
        routes: applications by their paths, which are asked without the search for a route in BentoML and in theirs.
        told: hears of whoever is sent away.
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: Tokens,
        routes: Mapping[str, ASGIApp] = MappingProxyType({}),
        told: Callable[[Scope, ApiError], None] = lambda scope, error: None,
    ) -> None:
        self._app, self._tokens, self._routes, self._told = app, tokens, routes, told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none; left to BentoML, it would never be answered
            await receive()
            await send({"type": "websocket.close", "code": 1000})  # before it is accepted: 403
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(ID_HEADER, b"")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex.encode()
        scope[_KEY] = request_id.decode()
        out = _Out(send, request_id, scope["method"] == "HEAD")
        if self._tokens.admit(scope["path"], headers.get(b"authorization", b"")):
            await self._routes.get(scope["path"], self._app)(scope, receive, out)
        else:
            error = ApiError(401, "unauthorized", "send a valid token in the header Authorization: Bearer …")
            self._told(scope, error)
            await error.response()(scope, receive, out)


def request_id_of(scope: Scope) -> str:
    """The id that the client sent or the gate made; empty without a gate."""
    return str(scope.get(_KEY, ""))


class _Out:
    """Adds the id to an answer; puts an error that is not in our form into it."""

    def __init__(self, send: Send, request_id: bytes, head: bool) -> None:
        self._send = send
        self._id = (ID_HEADER, request_id)
        self._head = head
        self._content: bytes | None = None  # what stands in for the answer's own

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers: list[Any] = list(message.get("headers", []))
            if message["status"] >= 400 and _type_of(headers) != b"application/json":
                headers = self._replaced(message["status"], headers)
            message = {**message, "headers": [*headers, self._id]}
        elif self._content is not None:
            content, self._content = self._content, b""
            message = {**message, "body": b"" if self._head else content}
        await self._send(message)

    def _replaced(self, status: int, headers: list[Any]) -> list[Any]:
        code = _CODES.get(status, "internal" if status >= 500 else "bad_request")
        error = ApiError(status, code, CODES[code].meaning, retry_after=1 if status == 503 else None)
        answer = error.response()
        self._content = bytes(answer.body)
        kept = [pair for pair in headers if pair[0] in (b"allow", b"server")]
        return [*kept, *answer.raw_headers]


def _type_of(headers: list[Any]) -> bytes:
    kind: bytes = dict(headers).get(b"content-type", b"")
    return kind.partition(b";")[0].strip()
