"""What a client may send for each field, and the checks of values: of whole columns, and one by one.

A column of 500 values is looked at as a whole, by the set of its types; only where that does not settle it, each value
is, which finds the culprit of an error.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from types import MappingProxyType, NoneType
from typing import Any, Literal, NamedTuple, TypeAlias

from features.fields import ListField, NumericField, RawField
from features.schema import Schema
from serving.api.errors import ApiError
from serving.api.times import parse_time, time_columns

# Takes a value and its location; gives the value as the pipeline takes it, or raises ApiError.
One: TypeAlias = Callable[[Any, str], Any]
# Takes a column; gives it as the pipeline takes it, or None where the values have to be looked at one by one.
Whole: TypeAlias = Callable[[list[Any]], list[Any] | None]
Kind = Literal["text", "whole", "number", "time"]
_WHOLE = re.compile(r"(\d{1,18}(\.0+)?)?", re.ASCII)  # "" is missing, as in files
MAX_WHOLE = 10**18 - 1
_TEXTS, _IDS, _NUMBERS = {str, NoneType}, {str, int, NoneType}, {float, int, NoneType}
_LISTS = {list, NoneType}


class Check(NamedTuple):
    """How a field's values are checked; null is a missing value everywhere."""

    one: One
    whole: Whole
    kind: Kind
    is_list: bool = False
    separated: bool = False  # whether a list may come as text with separators

    def column(self, values: list[Any], place: str) -> list[Any]:
        """The column as the pipeline takes it; ApiError names the place of the first wrong value."""
        whole = self.whole(values)
        if whole is not None:
            return whole
        return [self.one(value, f"{place}[{i}]") for i, value in enumerate(values)]


@dataclass(frozen=True)
class Sent:
    """The columns that a route takes, those of the schema's fields that it does not, and a mark of both."""

    checks: Mapping[str, Check]
    unsent: frozenset[str]
    mark: tuple[Any, ...]  # equal for schemas that ask clients for the same

    @classmethod
    def of(cls, schema: Schema, *, with_times: bool) -> "Sent":
        """The served fields and, where asked for, the columns that only date fields read."""
        checks = {field.name: check_of(schema, field) for field in schema.served_fields}
        times = time_columns(schema)
        if with_times:
            checks |= dict.fromkeys(times, Check(_time, _one_by_one, "time"))
        others = {field.name for field in schema.fields}.union(times) - checks.keys()
        separators = [field.separator for field in schema.served_fields if isinstance(field, ListField)]
        mark = [(name, check.kind, check.is_list) for name, check in checks.items()]
        return cls(MappingProxyType(checks), frozenset(others), (*mark, *separators))

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
    """The checks of a field's values."""
    if isinstance(field, NumericField):
        return Check(_number, _numbers, "number")
    identity = schema.encoder_of(field) == "identity"
    item = Check(_whole, _wholes, "whole") if identity else Check(_text, _texts, "text")
    if isinstance(field, ListField):
        return Check(_list(item.one, field), _lists(item.whole), item.kind, True, field.separator is not None)
    return item._replace(one=_optional(item.one))


def _optional(check: One) -> One:
    return lambda value, location: None if value is None else check(value, location)


def _list(item: One, field: ListField) -> One:
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


def _one_by_one(values: list[Any]) -> None:
    return None


def _texts(values: list[Any]) -> list[Any] | None:
    kinds = set(map(type, values))
    if kinds <= _TEXTS:
        return values
    if kinds == {int}:
        return list(map(str, values))
    return [None if value is None else str(value) for value in values] if kinds <= _IDS else None


def _wholes(values: list[Any]) -> list[Any] | None:
    kinds = set(map(type, values))
    if kinds == {int}:
        return list(map(str, values)) if min(values) >= 0 and max(values) <= MAX_WHOLE else None
    if kinds != {str}:
        return None
    digits = "".join(values)
    plain = digits.isascii() and digits.isdigit() and max(map(len, values)) <= len(str(MAX_WHOLE))
    return values if plain else None


def _numbers(values: list[Any]) -> list[Any] | None:
    kinds = set(map(type, values))
    # filter(None, …) leaves out null and 0, which are in order.
    if not kinds <= _NUMBERS or not all(map(math.isfinite, filter(None, values))):
        return None
    if int not in kinds:
        return values
    return [None if value is None else float(value) for value in values] if None in values else list(map(float, values))


def _lists(items: Whole) -> Whole:
    def whole(values: list[Any]) -> list[Any] | None:
        if not set(map(type, values)) <= _LISTS:
            return None
        flat = list(chain.from_iterable(filter(None, values)))
        if not flat:
            return values
        # A null item is wrong, though a null list is not; and what would become other values is rare enough.
        return values if None not in flat and items(flat) is flat else None

    return whole
