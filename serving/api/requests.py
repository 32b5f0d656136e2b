"""Request bodies into checked columns. What may be sent for a field stands in serving.api.values."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from features.schema import Schema
from serving.api.errors import ApiError
from serving.api.times import parse_time
from serving.api.values import Sent

MAX_ROWS = 5_000
DEFAULT_TOP_K = 10

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class RankRequest:
    """A checked /rank body: raw values, ready for the engine; without a time it is now."""

    context: dict[str, Any]
    candidates: Columns
    top_k: int
    time: datetime | None


def parse_rank(body: bytes, schema: Schema) -> RankRequest:
    """Check a /rank body; ApiError says what is wrong and where."""
    data = _object(body, {"context", "candidates", "top_k", "time"}, required={"candidates"})
    context = data.get("context", {})
    if not isinstance(context, dict):
        raise ApiError(422, "wrong_type", "context must be an object of field values", "context")
    sent = Sent.of(schema, with_times=False)
    for name, value in context.items():
        context[name] = sent.known(name, f"context.{name}")(value, f"context.{name}")
    candidates = _columns(data["candidates"], "candidates", sent, given=context)
    time = parse_time(data["time"], "time") if "time" in data else None
    return RankRequest(context, candidates, _top_k(data.get("top_k", DEFAULT_TOP_K)), time)


def parse_predict(body: bytes, schema: Schema) -> Columns:
    """Check a /predict body; ApiError says what is wrong and where."""
    data = _object(body, {"rows"}, required={"rows"})
    return _columns(data["rows"], "rows", Sent.of(schema, with_times=True), given={})


def _object(body: bytes, allowed: set[str], required: set[str]) -> dict[str, Any]:
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, "not_json", f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ApiError(422, "wrong_type", "the body must be a JSON object")
    for key in data:
        if key not in allowed:
            raise ApiError(422, "unknown_key", f"unknown key {key!r}; there are {', '.join(sorted(allowed))}", key)
    for key in required:
        if key not in data:
            raise ApiError(422, "missing_key", f"the key {key!r} is missing", key)
    return data


def _top_k(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ApiError(422, "wrong_type", "top_k must be a whole number of 1 or more", "top_k")
    return value


def _columns(data: Any, place: str, sent: Sent, given: dict[str, Any]) -> Columns:
    """Columns of checked values, from columns or from rows; fields in `given` must not be there, all others must."""
    _require_at_most(MAX_ROWS, data, place)
    if isinstance(data, list):
        count, columns = len(data), _from_rows(data, place, sent)
    elif isinstance(data, dict):
        count, columns = _from_columns(data, place, sent)
    else:
        raise ApiError(422, "wrong_type", f"{place} must be an object of columns or an array of rows", place)
    if count == 0 or not columns:
        raise ApiError(422, "no_rows", f"{place} is empty", place)
    for name in sent.checks:
        if name in columns and name in given:
            raise ApiError(422, "field_twice", f"field {name!r} is also in the context", f"{place}.{name}")
        if name not in columns and name not in given:
            raise ApiError(
                422, "missing_field", f"field {name!r} is missing; send null for no value", f"{place}.{name}"
            )
    return columns


def _require_at_most(limit: int, data: Any, place: str) -> None:
    """Before anything is looked at: a request above the limit costs no more than its parsing."""
    parts = data.values() if isinstance(data, dict) else [data]
    count = max((len(part) for part in parts if isinstance(part, list)), default=0)
    if count > limit:
        raise ApiError(413, "too_many_rows", f"{count} {place}; at most {limit} are taken at once", place)


def _from_columns(data: dict[str, Any], place: str, sent: Sent) -> tuple[int, Columns]:
    columns: Columns = {}
    for name, values in data.items():
        check = sent.known(name, f"{place}.{name}")
        if not isinstance(values, list):
            raise ApiError(422, "wrong_type", f"column {name!r} must be an array", f"{place}.{name}")
        columns[name] = [check(value, f"{place}.{name}[{i}]") for i, value in enumerate(values)]
    lengths = {name: len(values) for name, values in columns.items()}
    count = max(lengths.values(), default=0)
    for name, length in lengths.items():
        if length != count:
            message = f"column {name!r} has {length} values where others have {count}"
            raise ApiError(422, "ragged_columns", message, f"{place}.{name}")
    return count, columns


def _from_rows(rows: list[Any], place: str, sent: Sent) -> Columns:
    columns: Columns = {}
    names = list(rows[0]) if rows and isinstance(rows[0], dict) else []
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ApiError(422, "wrong_type", f"{place}[{i}] must be an object of field values", f"{place}[{i}]")
        for name, value in row.items():
            check = sent.known(name, f"{place}[{i}].{name}")
            values = columns.setdefault(name, [])
            if len(values) != i:
                raise ApiError(422, "missing_field", f"field {name!r} is missing before this row", f"{place}[0].{name}")
            values.append(check(value, f"{place}[{i}].{name}"))
        for name in names:
            if name not in row:
                message = f"field {name!r} is missing; send null for no value"
                raise ApiError(422, "missing_field", message, f"{place}[{i}].{name}")
    return columns
