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
from starlette.types import Receive, Scope, Send

from serving.api import answers
from serving.api.admission import Gone
from serving.api.answers import Answer
from serving.api.bodies import Form, form_of, gone, read_body, wants_arrow
from serving.api.errors import ApiError
from serving.api.gate import request_id_of
from serving.api.openapi import describe
from serving.api.parts import Parts
from serving.failures import log_failure
from serving.trace import Trace

_ROUTES = ("/rank", "/predict", "/model", "/docs.json")
_SERVICE = ("/livez", "/readyz", "/healthz", "/metrics")  # BentoML's, but for methods that it does not know
_UI = ("/", "/static_content/")  # BentoML's own pages, which are not this application's
_log = logging.getLogger("bentoml.masknet")  # below the logger that BentoML's server writes out

Handler = Callable[[Parts, Request], Awaitable[Response]]
Work = Callable[[Parts, Trace, bytes, Form, bool], Answer]


class Routes:
    """The routes, and `app`, which finds them.

    Args:
        parts: what answers; it may also be set later, before the first request.
    """

    def __init__(self, parts: Parts | None = None) -> None:
        self.parts = parts
        handlers: dict[str, tuple[str, Handler]] = {
            "/rank": ("POST", partial(_scored, answers.rank)),
            "/predict": ("POST", partial(_scored, answers.predict)),
            "/model": ("GET", _model),
            "/docs.json": ("GET", _docs),
        }
        self.by_path = {path: _Guarded(self, handler, verb) for path, (verb, handler) in handlers.items()}
        found: list[Route] = [Route(path, guarded) for path, guarded in self.by_path.items()]
        found += [_Wrong(path, _Guarded(self, _not_found, "GET")) for path in _SERVICE]
        found.append(_Otherwise("/{path:path}", _Guarded(self, _not_found, None)))
        self.app = Starlette(routes=found)

    def refused(self, scope: Scope, error: ApiError) -> None:
        """Count and log a refusal: what is wrong and where, but no value of the request unless that is asked for."""
        if self.parts is None:  # the service has just begun to start
            return
        route = scope["path"] if scope["path"] in _ROUTES else "other"
        self.parts.watch.refused(route, error.status, error.code)
        values = ""
        if self.parts.settings.log_requests:
            values = f" at {error.location}: {error.message}" if error.location else f": {error.message}"
        _log.info("request %s: %s %d %s%s", request_id_of(scope), route, error.status, error.code, values)


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


class _Guarded:
    """A handler as an application: any error goes into the one body; what nobody foresaw is logged and not told."""

    def __init__(self, routes: Routes, handler: Handler, verb: str | None) -> None:
        self._routes, self._handler, self._verb = routes, handler, verb

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._answer(Request(scope, receive, send))
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        parts, verb = self._routes.parts, self._verb
        assert parts is not None
        try:
            if verb and request.method != verb and not (verb == "GET" and request.method == "HEAD"):
                raise ApiError(405, "method_not_allowed", f"{request.url.path} takes {verb}", allow=verb)
            return await self._handler(parts, request)
        except ApiError as error:
            self._routes.refused(request.scope, error)
            return error.response()
        except (ClientDisconnect, Gone):
            return Response(status_code=499)  # nobody reads it; the number is the one that proxies log
        except Exception:
            told = (request_id_of(request.scope), request.url.path)
            log_failure(_log, "request %s: %s failed", *told, values=parts.settings.log_requests)
            failure = ApiError(500, "internal", "the server failed on this request")
            self._routes.refused(request.scope, failure)
            return failure.response()


async def _scored(work: Work, parts: Parts, request: Request) -> Response:
    """Admit, read, compute, answer; and tell those who watch once the answer is on its way."""
    trace = Trace(request.scope["path"], request_id_of(request.scope))
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
        log_failure(_log, "request %s: answered, and then lost to metrics or log", trace.request_id)


async def _model(parts: Parts, request: Request) -> Response:
    return Response(
        orjson.dumps(answers.about(parts), option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
    )


async def _docs(parts: Parts, request: Request) -> Response:
    return Response(orjson.dumps(describe(parts)), media_type="application/json")


async def _not_found(parts: Parts, request: Request) -> Response:
    raise ApiError(404, "not_found", f"there is no {request.url.path}; see /docs.json")
