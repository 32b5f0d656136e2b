"""Times in requests, as datetimes, which date fields read whatever their format in files."""

import re
from datetime import UTC, datetime
from typing import Any

from features.schema import Schema
from features.times import from_seconds
from serving.api.errors import ApiError

EXPECTED = "seconds since 1970 or ISO 8601 text"
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
