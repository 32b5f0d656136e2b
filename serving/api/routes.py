"""The REST routes as an ASGI application, to be mounted in a service."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import anyio
import orjson
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from features.errors import InputError
from serving.api.errors import ApiError
from serving.api.openapi import describe
from serving.api.requests import parse_predict, parse_rank
from serving.ranking.engine import Ranked, RankingEngine

MAX_BODY_BYTES = 16 * 2**20
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]  # all, so that a wrong one gets our body too
_UI = ("/", "/static_content/")  # BentoML's own pages, which are not this application's
_log = logging.getLogger(__name__)

T = TypeVar("T")
Answer = Callable[[RankingEngine, Request], Awaitable[Response]]


def create_app() -> Starlette:
    """Routes over the engine that is put in `app.state.engine` before the first request."""
    methods = {"/rank": ("POST", _rank), "/predict": ("POST", _predict), "/model": ("GET", _model)}
    methods["/docs.json"] = ("GET", _docs)
    routes: list[Route] = [
        Route(path, partial(_guarded, answer, verb), methods=_METHODS) for path, (verb, answer) in methods.items()
    ]
    return Starlette(
        routes=[*routes, _Otherwise("/{path:path}", partial(_guarded, _not_found, None), methods=_METHODS)]
    )


class _Otherwise(Route):
    """Whatever no route matches, except the pages of the service around this application."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        path = scope["path"]
        if path == _UI[0] or path.startswith(_UI[1]):
            return Match.NONE, {}
        return super().matches(scope)


async def _guarded(answer: Answer, verb: str | None, request: Request) -> Response:
    """Answer, or put any error into the one body; what nobody foresaw is logged and not told."""
    try:
        if verb and request.method != verb and not (verb == "GET" and request.method == "HEAD"):
            raise ApiError(405, "method_not_allowed", f"{request.url.path} takes {verb}")
        return await answer(request.app.state.engine, request)
    except ApiError as error:
        headers = {"Allow": verb} if error.status == 405 and verb else None
        return Response(orjson.dumps(error.body()), error.status, headers, "application/json")
    except ClientDisconnect:
        raise
    except Exception:
        _log.exception("request failed")
        failure = ApiError(500, "internal", "the server failed on this request")
        return Response(orjson.dumps(failure.body()), 500, media_type="application/json")


async def _rank(engine: RankingEngine, request: Request) -> Response:
    body = await _json_body(request)

    def work() -> list[Ranked]:
        asked = parse_rank(body, engine.schema)
        return engine.rank(asked.context, asked.candidates, asked.top_k, asked.time)

    best = await _compute(work)
    return _json(engine, {"items": [{"index": item.index, "score": item.score} for item in best]})


async def _predict(engine: RankingEngine, request: Request) -> Response:
    body = await _json_body(request)
    score_N = await _compute(lambda: engine.predict(parse_predict(body, engine.schema)))
    return _json(engine, {"scores": score_N.tolist()})


async def _model(engine: RankingEngine, request: Request) -> Response:
    scorer, metrics = engine.bundle.scorer, engine.bundle.manifest["metrics"]
    about = {"members": len(scorer.models), "calibration": scorer.calibration.kind}
    return _json(engine, {"metrics": metrics, **about, "schema": engine.schema.plain()})


async def _docs(engine: RankingEngine, request: Request) -> Response:
    return Response(orjson.dumps(describe(engine.schema)), media_type="application/json")


async def _not_found(engine: RankingEngine, request: Request) -> Response:
    raise ApiError(404, "not_found", f"there is no {request.url.path}; see /docs.json")


async def _json_body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "content_type", f"the body must be application/json, not {kind or 'untyped'}")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, "body_too_large", f"the body is above {MAX_BODY_BYTES} bytes")
    return bytes(body)


async def _compute(work: Callable[[], T]) -> T:
    """Parse and score in a thread, so that health checks are answered meanwhile."""
    try:
        return await anyio.to_thread.run_sync(work)
    except InputError as error:
        raise ApiError(422, "bad_value", str(error)) from None


def _json(engine: RankingEngine, content: dict[str, object]) -> Response:
    model = {"name": engine.name, "version": engine.version}
    return Response(orjson.dumps({"model": model, **content}), media_type="application/json")
