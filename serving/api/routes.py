"""The REST routes as an ASGI application, to be mounted in a service."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial

import orjson
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from serving.api import answers
from serving.api.admission import Gone
from serving.api.answers import Answer
from serving.api.bodies import Form, form_of, gone, read_body, wants_arrow
from serving.api.errors import ApiError
from serving.api.gate import request_id_of
from serving.api.openapi import describe
from serving.api.parts import Parts
from serving.trace import Trace

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]  # all: a wrong one gets our body too
_ROUTES = ("/rank", "/predict", "/model", "/docs.json")
_SERVICE = ("/livez", "/readyz", "/healthz", "/metrics")  # BentoML's, but for methods that it does not know
_UI = ("/", "/static_content/")  # BentoML's own pages, which are not this application's
_log = logging.getLogger("bentoml.masknet")  # below the logger that BentoML's server writes out

Handler = Callable[[Parts, Request], Awaitable[Response]]
Work = Callable[[Parts, Trace, bytes, Form, bool], Answer]


def create_app(parts: Parts | None = None) -> Starlette:
    """The routes; without parts, these are put in `app.state.parts` before the first request."""
    handlers: dict[str, tuple[str, Handler]] = {
        "/rank": ("POST", partial(_scored, answers.rank)),
        "/predict": ("POST", partial(_scored, answers.predict)),
        "/model": ("GET", _model),
        "/docs.json": ("GET", _docs),
    }
    routes: list[Route] = [
        Route(path, partial(_guarded, handler, verb), methods=_METHODS) for path, (verb, handler) in handlers.items()
    ]
    routes += [_Wrong(path, partial(_guarded, _not_found, "GET"), methods=_METHODS) for path in _SERVICE]
    routes.append(_Otherwise("/{path:path}", partial(_guarded, _not_found, None), methods=_METHODS))
    app = Starlette(routes=routes)
    app.state.parts = parts
    return app


class _Wrong(Route):
    """A path of the service around this application, with a method that it does not take."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return (Match.NONE, {}) if scope["method"] in ("GET", "HEAD") else super().matches(scope)


class _Otherwise(Route):
    """Whatever no route matches, except the pages of the service around this application."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        path = scope["path"]
        if path == _UI[0] or path.startswith(_UI[1]) or path in _SERVICE:
            return Match.NONE, {}
        return super().matches(scope)


async def _guarded(handler: Handler, verb: str | None, request: Request) -> Response:
    """Answer, or put any error into the one body; what nobody foresaw is logged and not told."""
    parts: Parts = request.app.state.parts
    try:
        if verb and request.method != verb and not (verb == "GET" and request.method == "HEAD"):
            raise ApiError(405, "method_not_allowed", f"{request.url.path} takes {verb}", allow=verb)
        return await handler(parts, request)
    except ApiError as error:
        _tell(parts, request, error)
        return error.response()
    except (ClientDisconnect, Gone):
        return Response(status_code=499)  # nobody reads it; the number is the one that proxies log
    except Exception:
        _log.exception("request %s: %s failed", request_id_of(request.scope), request.url.path)
        failure = ApiError(500, "internal", "the server failed on this request")
        _tell(parts, request, failure)
        return failure.response()


def _tell(parts: Parts, request: Request, error: ApiError) -> None:
    """Count and log a refusal: what is wrong and where, but no value of the request unless that is asked for."""
    route = request.url.path if request.url.path in _ROUTES else "other"
    parts.watch.refused(route, error.status, error.code)
    values = f": {error.message}" if parts.settings.log_requests else ""
    place = f" at {error.location}" if error.location and parts.settings.log_requests else ""
    _log.info("request %s: %s %d %s%s%s", request_id_of(request.scope), route, error.status, error.code, place, values)


async def _scored(work: Work, parts: Parts, request: Request) -> Response:
    """Admit, read, compute, answer; and tell those who watch once the answer is on its way."""
    trace = Trace(request.url.path, request_id_of(request.scope))
    if not parts.fleet.ready:
        raise ApiError(503, "not_ready", "no model is ready", retry_after=1)
    form = form_of(request)
    parts.admission.arrive()
    to_arrow = wants_arrow(request)
    with parts.room.share() as take:
        body = await read_body(request, parts.settings.limits, take)
        trace.lap("parse")
        answer = await parts.admission.run(
            lambda: work(parts, trace, body, form, to_arrow), trace.started, partial(gone, request)
        )
    afterwards = BackgroundTask(_afterwards, parts, trace, answer)
    return Response(answer.body, media_type=answer.media_type, background=afterwards)


async def _afterwards(parts: Parts, trace: Trace, answer: Answer) -> None:
    try:
        parts.watch.answered(trace)
        if parts.log is not None:
            parts.log.offer(trace)
        if answer.asked is not None:
            parts.fleet.after(answer.asked, trace)
    except Exception:
        _log.exception("request %s: answered, and then lost to metrics or log", trace.request_id)


async def _model(parts: Parts, request: Request) -> Response:
    return Response(
        orjson.dumps(answers.about(parts), option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
    )


async def _docs(parts: Parts, request: Request) -> Response:
    return Response(orjson.dumps(describe(parts)), media_type="application/json")


async def _not_found(parts: Parts, request: Request) -> Response:
    raise ApiError(404, "not_found", f"there is no {request.url.path}; see /docs.json")
