"""The bodies of requests and answers in the OpenAPI description, from the model's own schema."""

from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any, get_args

from features.columns import MAX_BYTES
from features.fields import DateField, ListField, NumericField, RawField
from features.schema import Schema
from serving.api.codes import CODES
from serving.api.requests import DEFAULT_TOP_K
from serving.api.times import EXPECTED, time_columns
from serving.api.values import MAX_WHOLE
from serving.calibration import Kind

Json = dict[str, Any]
_MOMENT = datetime(2024, 5, 1, 18, 30, tzinfo=UTC)
_FIRST, _LAST = (moment.replace(microsecond=0, tzinfo=UTC).timestamp() for moment in (datetime.min, datetime.max))
_TIME: list[Json] = [{"type": "number", "minimum": _FIRST, "maximum": _LAST}, {"type": "string"}]
_WHOLE = r"^([0-9]{1,18}(\.0+)?)?$"
_TEXT: Json = {"type": "string", "maxLength": MAX_BYTES, "description": f"At most {MAX_BYTES} bytes, none of them NUL"}
_INTEGER: Json = {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}  # a larger one is read as a float
_SCORE: Json = {"type": "number", "minimum": 0, "maximum": 1}


def rank_body(schema: Schema, limit: int, optional: Collection[str]) -> Json:
    """What /rank takes, and an example; `limit` is the most candidates, `optional` what may be left out."""
    fields = {field.name: _value(schema, field) for field in schema.served_fields}
    body = object_of({"context": object_of(fields), "candidates": _rows(fields, limit)}, required=["candidates"])
    body["properties"]["top_k"] = {**_INTEGER, "minimum": 1, "default": DEFAULT_TOP_K}
    body["properties"]["time"] = {"oneOf": _TIME, "description": f"{EXPECTED}, for date fields; now where left out"}
    body |= _fetched(optional)
    examples = {field.name: _example(schema, field) for field in schema.served_fields}
    own = schema.candidate_fields or tuple(examples)  # some fields must come with the candidates
    example = {
        "context": {name: value for name, value in examples.items() if name not in own},
        "candidates": {name: [examples[name]] * 2 for name in own},
        "top_k": 1,
    }
    return {"schema": body, "example": example | ({"time": _MOMENT.isoformat()} if schema.date_columns else {})}


def predict_body(schema: Schema, limit: int, optional: Collection[str]) -> Json:
    """What /predict takes, and an example; `limit` is the most rows, `optional` what may be left out."""
    fields = {field.name: _value(schema, field) for field in schema.served_fields}
    times = {"oneOf": _TIME, "nullable": True, "description": EXPECTED}
    fields |= dict.fromkeys(time_columns(schema), times)
    row = {field.name: _example(schema, field) for field in schema.served_fields}
    row |= dict.fromkeys(time_columns(schema), _MOMENT.timestamp())
    body = object_of({"rows": _rows(fields, limit)}, required=["rows"]) | _fetched(optional)
    return {"schema": body, "example": {"rows": [row]}}


def rank_answer(model: Json) -> Json:
    """What /rank answers, and an example by this model."""
    item = object_of({"index": {"type": "integer", "minimum": 0}, "score": _SCORE}, required=["index", "score"])
    items: Json = {"type": "array", "minItems": 1, "items": item}
    answer = object_of({"model": _reference(), "items": items}, required=["model", "items"])
    return {"schema": answer, "example": {"model": model, "items": [{"index": 1, "score": 0.93}]}}


def predict_answer(model: Json) -> Json:
    """What /predict answers, and an example by this model."""
    scores = {"type": "array", "minItems": 1, "items": _SCORE}
    answer = object_of({"model": _reference(), "scores": scores}, required=["model", "scores"])
    return {"schema": answer, "example": {"model": model, "scores": [0.07]}}


def model_answer(example: Json) -> Json:
    """What /model answers; what it answers now is the example."""
    free: Json = {"type": "object"}
    parts: Json = {
        "model": _reference(),
        "metrics": free,
        "members": {"type": "integer", "minimum": 1, "description": "Trained models whose scores are averaged"},
        "calibration": {"type": "string", "enum": list(get_args(Kind))},
        "engine": {**free, "description": "Backend, its largest difference, and the tables' memory and largest error"},
        "life": {
            **free,
            "description": "Where the model comes from, and which new version was refused, or is tried again, and why",
        },
        "schema": free,
    }
    return {"schema": object_of(parts, required=list(parts)), "example": example}


def error_body() -> Json:
    text: Json = {"type": "string"}
    texts = {"code": {**text, "enum": list(CODES)}, "message": text, "location": {**text, "nullable": True}}
    return object_of({"error": object_of(texts, required=list(texts))}, required=["error"])


def object_of(properties: dict[str, Json], required: list[str] | None = None) -> Json:
    """The JSON schema of an object with these keys and no others."""
    schema: Json = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": required} if required else {})


def _fetched(optional: Collection[str]) -> Json:
    return {"description": f"Fetched where left out: {', '.join(optional)}"} if optional else {}


def _rows(fields: dict[str, Json], limit: int) -> Json:
    columns = {name: {"type": "array", "items": value, "maxItems": limit} for name, value in fields.items()}
    rows = {"type": "array", "items": object_of(fields), "minItems": 1, "maxItems": limit}
    return {
        "oneOf": [object_of(columns), rows],
        "description": "Columns, or rows; every field once, here or in context",
    }


def _value(schema: Schema, field: RawField) -> Json:
    if isinstance(field, NumericField):
        return {"type": "number", "nullable": True}
    one: list[Json] = [_TEXT, _INTEGER]
    if schema.encoder_of(field) == "identity":
        one = [{"type": "string", "pattern": _WHOLE}, {"type": "integer", "minimum": 0, "maximum": MAX_WHOLE}]
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


def _reference() -> Json:
    return object_of({"name": {"type": "string"}, "version": {"type": "string"}}, required=["name", "version"])
