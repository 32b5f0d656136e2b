"""Times in requests and in golden rows, as datetimes, which date fields read whatever their format in files."""

import math
import re
from datetime import UTC, datetime, timedelta
from typing import Any

from features.schema import Schema
from serving.api.errors import ApiError

EXPECTED = "seconds since 1970 or ISO 8601 text"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?", re.ASCII)


def time_columns(schema: Schema) -> tuple[str, ...]:
    """The columns that hold nothing but times; a column that is a field as well is read in the field's own form."""
    fields = {field.name for field in schema.served_fields}
    return tuple(name for name in schema.date_columns if name not in fields)


def parse_time(value: Any, location: str) -> datetime:
    """A time in UTC from seconds since 1970 or ISO 8601 text, of which times without a zone are UTC; else ApiError."""
    if type(value) not in (int, float, str):
        raise ApiError(422, "wrong_type", f"expected {EXPECTED}, not {type(value).__name__}", location)
    try:
        if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
            time = datetime.fromisoformat(value.strip())
            return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
        return from_seconds(float(value))
    except (ValueError, OverflowError):
        raise ApiError(422, "bad_value", f"{str(value)[:80]!r} is no time: expected {EXPECTED}", location) from None


def from_seconds(seconds: float) -> datetime:
    """A time in UTC; ValueError or OverflowError where it is none of the years 1 to 9999."""
    if not math.isfinite(seconds):
        raise ValueError(f"{seconds} is no time")
    return _EPOCH + timedelta(seconds=seconds)
