"""The OpenAPI description of the routes: what is taken, what is answered, and every status that there can be."""

from importlib.metadata import version

from serving.api.arrow import METADATA
from serving.api.bodies import ARROW, JSON
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

_ERROR: Json = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
_ID: Json = {"schema": {"type": "string"}, "description": "The request's id: the one sent, or a new one"}
_LATER: Json = {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds until another try makes sense"}
_ANY = {"405": "The route takes another method", "500": "The server failed"}
_POSTED = {
    "400": "The body is not JSON, or no Arrow stream",
    "408": "The body did not arrive in time",
    "413": "Too many rows, or too large a body",
    "415": f"The body is neither {JSON} nor {ARROW}, or it is compressed",
    "422": "A key, field or value is wrong; `location` says which",
    "429": "Too many requests wait already",
    "503": "No model is ready, or the request's turn would come after its deadline",
}
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
    paths = {
        "/rank": {"post": _operation("Rank candidates", rank, rank_answer(), parts.protected)},
        "/predict": {"post": _operation("Score rows", predict, predict_answer(), parts.protected)},
        "/model": {"get": _operation(about, None, model_answer(), parts.protected)},
        "/docs.json": {"get": _operation("This description", None, {"type": "object"}, parts.protected)},
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
    content: Json = {JSON: {"schema": answer}}
    if body:
        content[ARROW] = {"schema": {"type": "string", "format": "binary"}}
    done: Json = {"description": "Done", "headers": {"x-request-id": _ID}, "content": content}
    errors = _ANY | (_POSTED if body else {}) | ({"401": "No valid bearer token"} if protected else {})
    operation: Json = {
        "summary": summary,
        "parameters": [{"name": "x-request-id", "in": "header", "schema": {"type": "string"}, "description": "Any id"}],
        "responses": {"200": done, **{code: _refusal(code, text) for code, text in sorted(errors.items())}},
    }
    if body:
        arrow: Json = {"schema": {"type": "string", "format": "binary", "description": _ARROW_TEXT}}
        operation["requestBody"] = {"required": True, "content": {JSON: body, ARROW: arrow}}
    if protected:
        operation["security"] = [{"token": []}]
    return operation


def _refusal(code: str, text: str) -> Json:
    headers = {"x-request-id": _ID} | ({"Retry-After": _LATER} if code in ("429", "503") else {})
    return {"description": text, "headers": headers, "content": _ERROR}


def _plain(description: str, may_be_503: bool = False) -> Json:
    content = {"text/plain": {"schema": {"type": "string"}}}
    responses: Json = {"200": {"description": description, "content": content}}
    responses["405"] = _refusal("405", _ANY["405"])
    if may_be_503:
        responses["503"] = _refusal("503", "Not yet, or not any more: the service is about to end")
    return {"summary": description, "responses": responses}
