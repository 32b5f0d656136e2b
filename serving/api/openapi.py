"""The OpenAPI description of the routes, written from the model's own schema."""

from datetime import UTC, datetime
from typing import Any, get_args

from features.fields import DateField, ListField, NumericField, RawField
from features.schema import Schema
from serving.api.requests import DEFAULT_TOP_K, MAX_ROWS
from serving.api.times import EXPECTED, time_columns
from serving.calibration import Kind

Json = dict[str, Any]
_MOMENT = datetime(2024, 5, 1, 18, 30, tzinfo=UTC)
_TIME: list[Json] = [{"type": "number"}, {"type": "string"}]
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
            "/model": {
                "get": _operation(
                    "The served model: version, metrics, members, calibration, schema", None, _model_answer()
                )
            },
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
    fields = {field.name: _value(schema, field) for field in schema.served_fields}
    body = _object({"context": _object(fields), "candidates": _rows(fields)}, required=["candidates"])
    body["properties"]["top_k"] = {"type": "integer", "minimum": 1, "default": DEFAULT_TOP_K}
    body["properties"]["time"] = {"oneOf": _TIME, "description": f"{EXPECTED}, for date fields; now where left out"}
    examples = {field.name: _example(schema, field) for field in schema.served_fields}
    own = schema.candidate_fields or tuple(examples)  # some fields must come with the candidates
    example = {
        "context": {name: value for name, value in examples.items() if name not in own},
        "candidates": {name: [examples[name]] * 2 for name in own},
        "top_k": 1,
    }
    return {"schema": body, "example": example | ({"time": _MOMENT.isoformat()} if schema.date_columns else {})}


def _predict_body(schema: Schema) -> Json:
    fields = {field.name: _value(schema, field) for field in schema.served_fields}
    times = {"oneOf": _TIME, "nullable": True, "description": EXPECTED}
    fields |= dict.fromkeys(time_columns(schema), times)
    row = {field.name: _example(schema, field) for field in schema.served_fields}
    row |= dict.fromkeys(time_columns(schema), _MOMENT.timestamp())
    return {"schema": _object({"rows": _rows(fields)}, required=["rows"]), "example": {"rows": [row]}}


def _rows(fields: dict[str, Json]) -> Json:
    columns = {name: {"type": "array", "items": value, "maxItems": MAX_ROWS} for name, value in fields.items()}
    rows = {"type": "array", "items": _object(fields), "minItems": 1, "maxItems": MAX_ROWS}
    return {"oneOf": [_object(columns), rows], "description": "Columns, or rows; every field once, here or in context"}


def _value(schema: Schema, field: RawField) -> Json:
    if isinstance(field, NumericField):
        return {"type": "number", "nullable": True}
    one: list[Json] = [{"type": "string"}, {"type": "integer"}]
    if schema.encoder_of(field) == "identity":
        one = [{"type": "string", "pattern": r"^[0-9]{1,18}$"}, {"type": "integer", "minimum": 0}]
    if isinstance(field, ListField):
        items: Json = {"type": "array", "items": {"oneOf": one}}
        return {"oneOf": [items, {"type": "string"}] if field.separator else [items], "nullable": True}
    return {"oneOf": one, "nullable": True}


def _example(schema: Schema, field: RawField) -> Any:
    """A value that the field takes; a time where a date field reads the same column."""
    dates = [other for other in schema.fields if isinstance(other, DateField) and other.from_ == field.name]
    if dates:
        text = _MOMENT.strftime(dates[0].format) if dates[0].format else f"{_MOMENT.timestamp():.0f}"
        return float(text) if isinstance(field, NumericField) else text
    if isinstance(field, NumericField):
        return 1
    texts = ["1", "2"] if schema.encoder_of(field) == "identity" else ["a", "b"]
    return texts if isinstance(field, ListField) else "1"


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
    members: Json = {"type": "integer", "minimum": 1, "description": "Trained models whose scores are averaged"}
    calibration: Json = {"type": "string", "enum": list(get_args(Kind))}
    parts: Json = {"model": _model_reference(), "metrics": free, "members": members, "calibration": calibration}
    return _object({**parts, "schema": free}, required=[*parts, "schema"])


def _error() -> Json:
    text: Json = {"type": "string"}
    texts = {"code": text, "message": text, "location": {**text, "nullable": True}}
    return _object({"error": _object(texts, required=list(texts))}, required=["error"])


def _object(properties: dict[str, Json], required: list[str] | None = None) -> Json:
    schema: Json = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": required} if required else {})
