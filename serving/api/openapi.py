"""The OpenAPI description of the routes: what is taken, what is answered, and every status that there can be."""

from importlib.metadata import version

from serving.api import answers
from serving.api.arrow import METADATA
from serving.api.bodies import ARROW, JSON
from serving.api.codes import CODES
from serving.api.openapi_bodies import (
    Json,
    error_body,
    model_answer,
    predict_answer,
    predict_body,
    rank_answer,
    rank_body,
)
from serving.api.parts import Parts

_ERROR: Json = {"$ref": "#/components/schemas/Error"}
_ID: Json = {"schema": {"type": "string"}, "description": "The request's id: the one sent, or a new one"}
_LATER: Json = {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds until another try makes sense"}
_HEADERS: dict[int, Json] = {
    401: {"WWW-Authenticate": {"schema": {"type": "string", "enum": ["Bearer"]}}},
    405: {"Allow": {"schema": {"type": "string"}, "description": "The method that the route takes"}},
    429: {"Retry-After": _LATER},
    503: {"Retry-After": _LATER},
}
_ANY, _POSTED = (405, 500), (400, 408, 413, 415, 422, 429, 503)
_ARROW_TEXT = (
    f"An Arrow IPC stream without compression: a column per field; the rest of the JSON body is JSON text under "
    f"`{METADATA.decode()}` in the metadata of its schema. With `accept: {ARROW}` the answer is a stream too: "
    "columns `index` and `score`, or `score`, and the model under the same key."
)


def describe(parts: Parts) -> Json:
    """An OpenAPI 3.0 document for the model that answers now."""
    schema, limit = parts.fleet.champion.schema, parts.settings.limits.rows
    rank, predict = rank_body(schema, limit, parts.optional), predict_body(schema, limit, parts.optional)
    about = "The served model: version, metrics, members, calibration, backend, schema"
    model = answers.about(parts)
    ranked, scored = rank_answer(model["model"]), predict_answer(model["model"])
    paths = {
        "/rank": {"post": _operation("Rank candidates", rank, ranked, parts.protected)},
        "/predict": {"post": _operation("Score rows", predict, scored, parts.protected)},
        "/model": {"get": _operation(about, None, model_answer(model), parts.protected)},
        "/docs.json": {"get": _operation("This description", None, {"schema": {"type": "object"}}, parts.protected)},
        "/livez": {"get": _plain("The process is up")},
        "/readyz": {"get": _plain("The model is loaded and verified", may_be_503=True)},
        "/metrics": {"get": _plain("Prometheus metrics")},
    }
    components: Json = {"schemas": {"Error": error_body()}}
    if parts.protected:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    info = {"title": f"MaskNet ranker: {schema.name}", "version": version("masknet")}
    return {"openapi": "3.0.3", "info": info, "paths": paths, "components": components}


def _operation(summary: str, body: Json | None, answer: Json, protected: bool) -> Json:
    content: Json = {JSON: answer}
    if body:
        content[ARROW] = {"schema": {"type": "string", "format": "binary"}}
    done: Json = {"description": "Done", "headers": {"x-request-id": _ID}, "content": content}
    errors = sorted({*_ANY, *(_POSTED if body else ()), *((401,) if protected else ())})
    operation: Json = {
        "summary": summary,
        "parameters": [{"name": "x-request-id", "in": "header", "schema": {"type": "string"}, "description": "Any id"}],
        "responses": {"200": done, **{str(status): _refusal(status) for status in errors}},
    }
    if body:
        arrow: Json = {"schema": {"type": "string", "format": "binary", "description": _ARROW_TEXT}}
        operation["requestBody"] = {"required": True, "content": {JSON: body, ARROW: arrow}}
    if protected:
        operation["security"] = [{"token": []}]
    return operation


def _refusal(status: int) -> Json:
    """The answer of a status, with an example of each of its codes."""
    codes = {code: refusal for code, refusal in CODES.items() if refusal.status == status}
    examples = {
        code: {"value": {"error": {"code": code, "message": refusal.message, "location": refusal.location}}}
        for code, refusal in codes.items()
    }
    return {
        "description": "; ".join(f"`{code}`: {refusal.meaning}" for code, refusal in codes.items()),
        "headers": {"x-request-id": _ID, **_HEADERS.get(status, {})},
        "content": {JSON: {"schema": _ERROR, "examples": examples}},
    }


def _plain(description: str, may_be_503: bool = False) -> Json:
    content = {"text/plain": {"schema": {"type": "string"}}}
    responses: Json = {"200": {"description": description, "content": content}, "405": _refusal(405)}
    if may_be_503:
        responses["503"] = _refusal(503)
    return {"summary": description, "responses": responses}
