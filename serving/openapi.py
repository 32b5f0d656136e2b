"""The OpenAPI description of the routes, written from the model's own schema."""

from typing import Any

from features.schema import FieldSpec, ListField, NumericField, Schema
from serving.requests import DEFAULT_TOP_K, MAX_ROWS

Json = dict[str, Any]
_ERRORS = {
    "400": "The body is not JSON",
    "405": "The route takes another method",
    "413": "Too many rows, or too large a body",
    "415": "The body is not application/json",
    "422": "A key, field or value is wrong; `location` says which",
    "500": "The server failed",
}


def describe(schema: Schema) -> Json:
    """An OpenAPI 3.0 document for a model with this schema."""
    return {
        "openapi": "3.0.3",
        "info": {"title": f"MaskNet ranker: {schema.name}", "version": "1"},
        "paths": {
            "/rank": {"post": _operation("Rank candidates", _rank_body(schema), _rank_answer())},
            "/predict": {"post": _operation("Score rows", _predict_body(schema), _predict_answer())},
            "/model": {"get": _operation("The served model: version, metrics, schema", None, _model_answer())},
            "/livez": {"get": _plain("The process is up")},
            "/readyz": {"get": _plain("The model is loaded and verified")},
            "/metrics": {"get": _plain("Prometheus metrics")},
        },
        "components": {"schemas": {"Error": _error()}},
    }


def _operation(summary: str, body: Json | None, answer: Json) -> Json:
    errors = {code: text for code, text in _ERRORS.items() if body or code in ("405", "500")}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    operation: Json = {
        "summary": summary,
        "responses": {
            "200": {"description": "Done", "content": {"application/json": {"schema": answer}}},
            **{code: {"description": text, "content": error} for code, text in errors.items()},
        },
    }
    if body:
        operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    return operation


def _plain(description: str) -> Json:
    return {"summary": description, "responses": {"200": {"description": description}}}


def _rank_body(schema: Schema) -> Json:
    fields = {field.name: _value(field) for field in schema.fields}
    candidates = {name: _example(schema, name) for name in schema.candidate_fields}
    body = _object({"context": _object(fields), "candidates": _rows(fields)}, required=["candidates"])
    body["properties"]["top_k"] = {"type": "integer", "minimum": 1, "default": DEFAULT_TOP_K}
    example = {
        "context": {name: _example(schema, name) for name in schema.context},
        "candidates": {name: [value, value] for name, value in candidates.items()},
        "top_k": 1,
    }
    return {"schema": body, "example": example}


def _predict_body(schema: Schema) -> Json:
    fields = {field.name: _value(field) for field in schema.fields}
    body = _object({"rows": _rows(fields)}, required=["rows"])
    return {"schema": body, "example": {"rows": [{name: _example(schema, name) for name in fields}]}}


def _rows(fields: dict[str, Json]) -> Json:
    columns = {name: {"type": "array", "items": value, "maxItems": MAX_ROWS} for name, value in fields.items()}
    rows = {"type": "array", "items": _object(fields), "minItems": 1, "maxItems": MAX_ROWS}
    return {"oneOf": [_object(columns), rows], "description": "Columns, or rows; every field once, here or in context"}


def _value(field: FieldSpec) -> Json:
    text_or_int: list[Json] = [{"type": "string"}, {"type": "integer"}]
    if isinstance(field, NumericField):
        return {"type": "number", "nullable": True}
    if isinstance(field, ListField):
        items: Json = {"type": "array", "items": {"oneOf": text_or_int}}
        return {"oneOf": [items, {"type": "string"}] if field.separator else [items], "nullable": True}
    return {"oneOf": text_or_int, "nullable": True}


def _example(schema: Schema, name: str) -> Any:
    field = next(field for field in schema.fields if field.name == name)
    return 1 if isinstance(field, NumericField) else ["a", "b"] if isinstance(field, ListField) else "1"


def _model_reference() -> Json:
    return _object({"name": {"type": "string"}, "version": {"type": "string"}}, required=["name", "version"])


def _rank_answer() -> Json:
    item = _object({"index": {"type": "integer"}, "score": {"type": "number"}}, required=["index", "score"])
    return _object(
        {"model": _model_reference(), "items": {"type": "array", "items": item}}, required=["model", "items"]
    )


def _predict_answer() -> Json:
    scores = {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}}
    return _object({"model": _model_reference(), "scores": scores}, required=["model", "scores"])


def _model_answer() -> Json:
    free: Json = {"type": "object"}
    return _object(
        {"model": _model_reference(), "metrics": free, "schema": free}, required=["model", "metrics", "schema"]
    )


def _error() -> Json:
    text: Json = {"type": "string"}
    texts = {"code": text, "message": text, "location": {**text, "nullable": True}}
    return _object({"error": _object(texts, required=list(texts))}, required=["error"])


def _object(properties: dict[str, Json], required: list[str] | None = None) -> Json:
    schema: Json = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": required} if required else {})
