"""Columns of an Arrow stream, checked as those of JSON are: types by their field's kind, and values at once.

text       string, large_string, either with a dictionary, integers
numbers    integers, floats (finite)
lists      list or large_list of texts or integers; text, where the schema has a separator
times      timestamps, numbers (seconds since 1970), ISO 8601 text
"""

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from serving.api.errors import ApiError
from serving.api.times import EXPECTED
from serving.api.values import MAX_WHOLE, Check

_WHOLE = r"^(\d{1,18}(\.0+)?)?$"
_INSTANT = pa.timestamp("us", "UTC")
_FIRST, _LAST = (pa.scalar(moment.replace(tzinfo=UTC), _INSTANT) for moment in (datetime.min, datetime.max))
TYPES = "integers, floats, strings, large_strings, either of them with a dictionary, lists of them, timestamps"


def sized(kind: pa.DataType, location: str) -> None:
    """ApiError unless a column of this type takes no more memory than the bytes that were sent (but dictionaries)."""
    flat = kind.value_type if pa.types.is_dictionary(kind) or _is_list(kind) else kind
    known = _is_text(flat) or pa.types.is_integer(flat) or pa.types.is_floating(flat) or pa.types.is_null(flat)
    if pa.types.is_dictionary(kind):
        known = _is_text(flat)
    if not known and not pa.types.is_timestamp(kind):
        raise ApiError(422, "wrong_type", f"columns are {TYPES}; not {kind}", location)


def joined(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies a single one, too
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


def decoded_bytes(array: pa.Array) -> int:
    """Of a dictionary's text, each value as often as it is meant; 0 of an array without dictionary."""
    if not pa.types.is_dictionary(array.type):
        return 0
    return pc.sum(pc.binary_length(array.dictionary).take(array.indices)).as_py() or 0


def checked_column(array: pa.Array, check: Check, location: str) -> pa.Array:
    """The column as the pipeline takes it; ApiError names the place of the first wrong value."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_null(array.type):
        return array
    if check.kind == "number":
        return _numbers(array, location)
    if check.kind == "time":
        return _times(array, check, location)
    if check.is_list and _is_list(array.type):
        if pa.types.is_null(array.type.value_type):
            return _without_items(array, location)
        _check_items(array, check, location)
        return array
    if check.is_list and not check.separated:
        raise _wrong(array, "an array of texts or whole numbers", location)
    if check.is_list and check.kind == "whole":  # text of several numbers
        return pa.array(check.column(array.to_pylist(), location), pa.list_(pa.string()))
    if not _is_text(array.type) and (check.is_list or not pa.types.is_integer(array.type)):
        expected = "an array, or text with separators" if check.is_list else "text or a whole number"
        raise _wrong(array, expected, location)
    if check.kind == "whole":
        _check_whole(array, location)
    return array


def _numbers(array: pa.Array, location: str) -> pa.Array:
    if not pa.types.is_integer(array.type) and not pa.types.is_floating(array.type):
        raise _wrong(array, "a finite number", location)
    if pa.types.is_floating(array.type):
        values = array.cast(pa.float32()) if pa.types.is_float16(array.type) else array
        _refuse_where(pc.invert(pc.is_finite(values)), "wrong_type", "expected a finite number", location)
        return values
    return array


def _times(array: pa.Array, check: Check, location: str) -> pa.Array:
    if pa.types.is_timestamp(array.type):
        return _instants(array, location)
    return pa.array(check.column(array.to_pylist(), location), _INSTANT)


def _instants(array: pa.Array, location: str) -> pa.Array:
    """Timestamps as microseconds in UTC. The zone in their type, a name that need not exist, moves no instant."""
    try:
        moments = pc.cast(array, options=pc.CastOptions(_INSTANT, allow_time_truncate=True))
    except pa.ArrowInvalid:  # seconds or milliseconds beyond what microseconds can count
        raise ApiError(422, "bad_value", f"holds what is no time: expected {EXPECTED}", location) from None
    years = pc.and_(pc.greater_equal(moments, _FIRST), pc.less_equal(moments, _LAST))
    _refuse_where(pc.invert(years), "bad_value", f"is no time: expected {EXPECTED}", location)
    return moments


def _without_items(array: pa.Array, location: str) -> pa.Array:
    """Lists of nothing. Null items have no bytes, so that no more may be done with them than to count them."""
    if pc.sum(pc.list_value_length(array)).as_py():
        raise _wrong(array.values, "texts or whole numbers", location)
    return pa.nulls(len(array))


def _check_items(array: pa.Array, check: Check, location: str) -> None:
    items = pc.list_flatten(array)
    if not (_is_text(items.type) or pa.types.is_integer(items.type)):
        raise _wrong(items, "texts or whole numbers", location)
    _refuse_where(items.is_null(), "wrong_type", "expected text or a whole number, not null", location, array)
    if check.kind == "whole":
        _check_whole(items, location, array)


def _check_whole(array: pa.Array, location: str, lists: pa.Array | None = None) -> None:
    if pa.types.is_integer(array.type):
        good = pc.and_(pc.greater_equal(array, 0), pc.less_equal(array, min(MAX_WHOLE, _top(array.type))))
    else:
        good = pc.match_substring_regex(array, _WHOLE)
    _refuse_where(pc.invert(good), "bad_value", "is no whole number of 0 or more", location, lists)


def _top(kind: pa.DataType) -> int:
    """The largest number of an integer type."""
    bits = kind.bit_width - (1 if pa.types.is_signed_integer(kind) else 0)
    return int(2**bits - 1)


def _refuse_where(bad: pa.Array, code: str, message: str, location: str, lists: pa.Array | None = None) -> None:
    """ApiError at the first true value; `lists` are those whose items are looked at."""
    first = pc.index(bad, True).as_py()
    if first < 0:
        return
    if lists is None:
        raise ApiError(422, code, message, f"{location}[{first}]")
    rows = pc.list_parent_indices(lists)
    row = rows[first].as_py()
    item = first - pc.index(rows, row).as_py()
    raise ApiError(422, code, message, f"{location}[{row}][{item}]")


def _wrong(array: Any, expected: str, location: str) -> ApiError:
    return ApiError(422, "wrong_type", f"expected {expected}, not {array.type}", location)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))
