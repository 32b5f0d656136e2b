"""What a client may send for each field, and the checks of single values."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any, TypeAlias

from features.fields import ListField, NumericField, RawField
from features.schema import Schema
from serving.api.errors import ApiError
from serving.api.times import parse_time, time_columns

# Takes a value and its location; gives the value as the pipeline takes it, or raises ApiError.
Check: TypeAlias = Callable[[Any, str], Any]
_WHOLE = re.compile(r"(\d{1,18}(\.0+)?)?", re.ASCII)  # "" is missing, as in files


@dataclass(frozen=True)
class Sent:
    """The columns that a route takes, and those of the schema's fields that it does not."""

    checks: Mapping[str, Check]
    unsent: frozenset[str]

    @classmethod
    def of(cls, schema: Schema, *, with_times: bool) -> "Sent":
        """The served fields and, where asked for, the columns that only date fields read."""
        checks: dict[str, Check] = {field.name: check_of(schema, field) for field in schema.served_fields}
        times = time_columns(schema)
        if with_times:
            checks |= dict.fromkeys(times, _time)
        others = {field.name for field in schema.fields}.union(times) - checks.keys()
        return cls(MappingProxyType(checks), frozenset(others))

    def known(self, name: str, location: str) -> Check:
        """The check of a column's values; ApiError where clients do not send it."""
        if name in self.checks:
            return self.checks[name]
        if name in self.unsent:
            message = f"field {name!r} is not sent by clients; they send {', '.join(self.checks)}"
        else:
            message = f"unknown field {name!r}; there are {', '.join(self.checks)}"
        raise ApiError(422, "unknown_field", message, location)


def check_of(schema: Schema, field: RawField) -> Check:
    """The check of a field's values; null is a missing value everywhere."""
    if isinstance(field, NumericField):
        return _number
    item = _whole if schema.encoder_of(field) == "identity" else _text
    return _list(item, field) if isinstance(field, ListField) else _optional(item)


def _optional(check: Check) -> Check:
    return lambda value, location: None if value is None else check(value, location)


def _list(item: Check, field: ListField) -> Check:
    def check(value: Any, location: str) -> list[Any] | None:
        if value is None:
            return None
        if isinstance(value, list):
            return [item(part, f"{location}[{i}]") for i, part in enumerate(value)]
        if field.separator is None:
            raise ApiError(422, "wrong_type", "expected an array of texts or whole numbers", location)
        text = _checked(value, isinstance(value, str), "an array, or text with separators", location)
        return [item(part, location) for part in text.split(field.separator)]

    return check


def _number(value: Any, location: str) -> float | None:
    if value is None:
        return None
    finite = type(value) in (int, float) and math.isfinite(value)
    return float(_checked(value, finite, "a finite number", location))


def _text(value: Any, location: str) -> str:
    return str(_checked(value, type(value) in (str, int), "text or a whole number", location))


def _whole(value: Any, location: str) -> str:
    text = _text(value, location)
    if not _WHOLE.fullmatch(text):
        raise ApiError(422, "bad_value", f"{text[:80]!r} is no whole number of 0 or more", location)
    return text


def _time(value: Any, location: str) -> datetime | None:
    return None if value is None or value == "" else parse_time(value, location)


def _checked(value: Any, good: bool, expected: str, location: str) -> Any:
    if not good:
        raise ApiError(422, "wrong_type", f"expected {expected}, not {type(value).__name__}", location)
    return value
