"""Request bodies in JSON into checked columns. What may be sent for a field stands in serving.api.values."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import orjson
import pyarrow as pa

from features.schema import Schema
from serving.api.columns import Columns, columns_of
from serving.api.errors import ApiError
from serving.api.times import parse_time
from serving.api.values import Sent
from serving.settings import Limits

MAX_ROWS = Limits().rows
DEFAULT_TOP_K = 10


@dataclass(frozen=True)
class RankRequest:
    """A checked /rank body: raw values, ready for the engine; without a time it is now."""

    context: dict[str, Any]
    candidates: Columns | pa.Table
    top_k: int
    time: datetime | None


def parse_rank(body: bytes, schema: Schema, *, optional: Collection[str] = (), rows: int = MAX_ROWS) -> RankRequest:
    """Check a /rank body; ApiError says what is wrong and where.

    Args:
        body: JSON.
        schema: of the model that answers.
        optional: fields that may be left out, since they are fetched.
        rows: the most candidates.
    """
    data = object_of(body, {"context", "candidates", "top_k", "time"}, required=("candidates",))
    sent = sent_of(schema, with_times=False)
    context = context_of(data, sent)
    candidates = columns_of(data["candidates"], "candidates", sent, rows)
    require_fields(candidates, "candidates", sent, context, optional)
    return RankRequest(context, candidates, top_k_of(data), time_of(data))


def parse_predict(body: bytes, schema: Schema, *, optional: Collection[str] = (), rows: int = MAX_ROWS) -> Columns:
    """Check a /predict body; ApiError says what is wrong and where."""
    data = object_of(body, {"rows"}, required=("rows",))
    sent = sent_of(schema, with_times=True)
    columns = columns_of(data["rows"], "rows", sent, rows)
    require_fields(columns, "rows", sent, {}, optional)
    return columns


def object_of(body: bytes, allowed: set[str], required: Sequence[str] = ()) -> dict[str, Any]:
    """A JSON object with no other keys than those."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, "not_json", f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ApiError(422, "wrong_type", "the body must be a JSON object")
    for key in data:
        if key not in allowed:
            message = f"unknown key {key!r}; there are {', '.join(sorted(allowed)) or 'none'}"
            raise ApiError(422, "unknown_key", message, key)
    for key in required:
        if key not in data:
            raise ApiError(422, "missing_key", f"the key {key!r} is missing", key)
    return data


def sent_of(schema: Schema, *, with_times: bool) -> Sent:
    """What clients send, worked out once per schema."""
    return _sent_of(_ById(schema), with_times)


def context_of(data: dict[str, Any], sent: Sent) -> dict[str, Any]:
    """The checked context of a /rank body."""
    context = data.get("context", {})
    if not isinstance(context, dict):
        raise ApiError(422, "wrong_type", "context must be an object of field values", "context")
    return {name: sent.known(name, f"context.{name}").one(value, f"context.{name}") for name, value in context.items()}


def top_k_of(data: dict[str, Any]) -> int:
    """The checked `top_k` of a /rank body."""
    value = data.get("top_k", DEFAULT_TOP_K)
    if type(value) is not int or value < 1:
        raise ApiError(422, "wrong_type", "top_k must be a whole number of 1 or more", "top_k")
    return value


def time_of(data: dict[str, Any]) -> datetime | None:
    """The checked `time` of a /rank body."""
    return parse_time(data["time"], "time") if "time" in data else None


def require_fields(
    columns: Collection[str], place: str, sent: Sent, context: Collection[str], optional: Collection[str]
) -> None:
    """Every field that clients send is there once, in the context or per row."""
    for name in sent.checks:
        if name in columns:
            if name in context:
                raise ApiError(422, "field_twice", f"field {name!r} is also in the context", f"{place}.{name}")
        elif name not in context and name not in optional:
            message = f"field {name!r} is missing; send null for no value"
            raise ApiError(422, "missing_field", message, f"{place}.{name}")


class _ById:
    """A schema as a key: the hash of its dozens of fields would cost more than the parsing of a request."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema

    def __hash__(self) -> int:
        return id(self.schema)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.schema is other.schema


@lru_cache(maxsize=16)  # the models of one service, and those that they replace
def _sent_of(key: _ById, with_times: bool) -> Sent:
    return Sent.of(key.schema, with_times=with_times)
