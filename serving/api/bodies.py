"""Bodies of requests: which form they have, and their bytes within the limits of size and time."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from starlette.requests import ClientDisconnect, Request

from serving.api.errors import ApiError
from serving.settings import Limits

JSON, ARROW = "application/json", "application/vnd.apache.arrow.stream"
Form = Literal["json", "arrow"]
Take = Callable[[int], None]


def form_of(request: Request) -> Form:
    """JSON or Arrow, by the content type; ApiError 415 for any other."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == JSON:
        return "json"
    if kind == ARROW:
        return "arrow"
    raise ApiError(415, "content_type", f"the body must be {JSON} or {ARROW}, not {kind or 'untyped'}")


def wants_arrow(request: Request) -> bool:
    """Whether the answer shall be Arrow: only where `accept` names it."""
    accept = request.headers.get("accept", "")
    return any(part.partition(";")[0].strip().lower() == ARROW for part in accept.split(","))


class Room:
    """Bytes of one worker for bodies that arrive or wait: as many as the largest ones of a full queue have."""

    def __init__(self, limits: Limits) -> None:
        self._left = limits.body_bytes * (limits.queue + limits.concurrency)

    @contextmanager
    def share(self) -> Iterator[Take]:
        """Gives what is told of the bytes of one request as they arrive; at the end there is room for others."""
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if count > self._left:
                raise ApiError(429, "queue_full", "too many requests are on their way already", retry_after=1)
            self._left -= count
            taken += count

        try:
            yield take
        finally:
            self._left += taken


async def read_body(request: Request, limits: Limits, take: Take) -> bytes:
    """The whole body.

    Args:
        request: whose content type is one of ours.
        limits: of size and time.
        take: told of every part that has come, by its bytes (see Room).

    Raises:
        ApiError: 413 above the size limit, by the length that is announced where it is; 415 for a content encoding;
            408 where the body does not arrive in time, so that nobody holds connections by sending slowly; 429 where
            the bodies of others leave no room.
        ClientDisconnect: the client has closed the connection.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(415, "content_encoding", "the body must not be compressed")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limits.body_bytes:
        raise _too_large(limits)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            more = True
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunk, more = message.get("body", b""), message.get("more_body", False)
                size += len(chunk)
                if size > limits.body_bytes:
                    raise _too_large(limits)
                take(len(chunk))
                chunks.append(chunk)
    except TimeoutError:
        raise ApiError(408, "body_too_slow", f"the body did not arrive within {limits.body_seconds:g} s") from None
    return b"".join(chunks)


async def gone(request: Request) -> None:
    """Returns once the client has closed the connection; for after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_large(limits: Limits) -> ApiError:
    return ApiError(413, "body_too_large", f"the body is above {limits.body_bytes} bytes")
