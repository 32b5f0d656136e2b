"""Raw columns of any origin into one canonical form, so that CSV, Parquet, pandas and JSON rows encode alike.

categorical → string, list → list<string>, numeric → double, date → double (seconds since 1970, UTC); null is missing
everywhere, and so is empty text. This is the one place where values become text or numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import InputError, listed, one_line
from features.fields import CategoricalField, DateField, ListField, RawField
from features.times import as_seconds
from features.utf8 import RULE, sound_text, text_bytes

MAX_BYTES = 4096  # of one text value; a longer one is a broken row more likely than an id
_EXACT = 2.0**53  # doubles hold every whole number below
_WHOLE = r"^(-?\d+)\.0+$"

Rows: TypeAlias = pa.Table | pd.DataFrame | Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]
BoolN = npt.NDArray[np.bool_]


class Canonical(NamedTuple):
    """A column in canonical form, which rows could not be read (None when all could), and the rule they break."""

    values: pa.Array
    bad_N: BoolN | None = None
    rule: str = ""


def as_table(rows: Rows) -> pa.Table:
    """Columns from a table, a frame, a mapping of columns or a sequence of rows."""
    try:
        if isinstance(rows, pa.Table):
            return rows
        if isinstance(rows, pd.DataFrame):
            return pa.table({str(name): _frame_column(str(name), rows[name]) for name in rows.columns})
        if isinstance(rows, Mapping):
            return pa.table({name: _array(name, values) for name, values in rows.items()})
        names = dict.fromkeys(name for row in rows for name in row)
        return pa.table({name: _array(name, [row.get(name) for row in rows]) for name in names})
    except (pa.ArrowException, OverflowError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"rows do not form a table: {one_line(error)}") from None


def _frame_column(name: str, column: "pd.Series[Any]") -> pa.Array:
    if isinstance(column.dtype, pd.DatetimeTZDtype):
        column = column.dt.tz_convert(None)  # times without a zone are UTC here
    if column.dtype != object:
        return pa.array(column, from_pandas=True)
    return _array(name, [_plain_value(value) for value in column.tolist()])


def _plain_value(value: Any) -> Any:
    """What a cell of an object column means: NA and NaN are null, and Parquet's lists come as arrays."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return None if value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value) else value


def _array(name: str, values: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        # A column that mixes 7 and "7" is legal for ids, which are compared as text.
        try:
            if all(value is None or isinstance(value, (str, int)) for value in values):
                return pa.array([None if value is None else str(value) for value in values], pa.string())
        except UnicodeEncodeError:
            raise InputError(f"column {name!r} holds text that is not Unicode") from None
        raise InputError(f"column {name!r} mixes kinds of values that do not go together") from None


def canonical(table: pa.Table, field: RawField | DateField, encoder: str = "") -> Canonical:
    """The field's column of `table` in canonical form.

    Args:
        table: raw rows.
        field: what the column is.
        encoder: the kind of encoder that reads it; "identity" takes whole numbers only.

    Raises:
        InputError: the column is absent, or of a type that can never hold such a field.
    """
    name = field.from_ if isinstance(field, DateField) else field.name
    column = plain(column_of(table, name))
    if isinstance(field, CategoricalField):
        found = as_strings(column, name)
        return _only_whole(found) if encoder == "identity" and found.bad_N is None else found
    if isinstance(field, ListField):
        return _as_lists(column, field, encoder)
    if isinstance(field, DateField):
        return Canonical(*as_seconds(column, name, field.format), "is no time")
    return as_numbers(column, name)


def with_default(table: pa.Table, field: RawField | DateField, rows: int | None = None) -> pa.Table:
    """The table, with a column of defaults where it lacks that of a training-only field; `rows` if it has no column."""
    default = None if isinstance(field, DateField) else field.training_only
    if default is None or field.name in table.column_names:
        return table
    count = table.num_rows if rows is None else rows
    return pa.table({field.name: pa.repeat(pa.scalar(default.default), count)})


def column_of(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column, or an InputError that names it."""
    if name not in table.column_names:
        raise InputError(f"column {name!r} is missing; there are {listed(table.column_names)}")
    return table[name]


def plain(column: pa.ChunkedArray) -> pa.Array:
    """One array without the encodings that Arrow has for the same values: dictionary, large, view and fixed-size."""
    chunks = column.chunks or [pa.array([], column.type)]
    array = pa.concat_arrays(chunks) if len(chunks) > 1 else chunks[0]
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return array.cast(pa.string())
    if pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return array.cast(pa.list_(kind.value_type))
    return array


def as_strings(column: pa.Array, name: str) -> Canonical:
    """Text of any scalar column: whole numbers lose their point, "" is null."""
    if pa.types.is_nested(column.type):
        raise InputError(f"column {name!r} holds {column.type}, which is not one value a row")
    if pa.types.is_boolean(column.type):
        return Canonical(pc.if_else(column, "True", "False"))  # as Python and pandas write them
    if pa.types.is_floating(column.type):
        return Canonical(_text_of_floats(column, name))
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        raise InputError(f"column {name!r} holds bytes, which are not text")
    try:
        text = column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise InputError(f"column {name!r} holds {column.type}, which cannot be read as text") from None
    return Canonical(text) if pa.types.is_integer(column.type) else clean_text(text)


def clean_text(text: pa.Array) -> Canonical:
    """Text without empty values and without the ".0" that pandas writes behind a whole number beside a null."""
    text, broken_N = sound_text(text)
    if broken_N is not None:
        return Canonical(clean_text(text).values, broken_N, RULE)
    data = text_bytes(text)
    if b"." in data and b".0" in data:  # the search for one byte is a memory scan
        text = pc.replace_substring_regex(text, _WHOLE, r"\1")
    length_N = pc.binary_length(text)
    shortest_longest = pc.min_max(length_N)
    if shortest_longest["min"].as_py() == 0:
        text = pc.if_else(pc.equal(length_N, 0), None, text)
    if (shortest_longest["max"].as_py() or 0) > MAX_BYTES:
        bad = pc.fill_null(pc.greater(length_N, MAX_BYTES), False).to_numpy(zero_copy_only=False)
        return Canonical(pc.if_else(pa.array(bad), None, text), bad, f"is longer than {MAX_BYTES} bytes")
    if b"\0" in data:
        bad = pc.fill_null(pc.match_substring(text, "\0"), False).to_numpy(zero_copy_only=False)
        if bad.any():
            return Canonical(pc.if_else(pa.array(bad), None, text), bad, "contains a NUL")
    return Canonical(text)


def _text_of_floats(column: pa.Array, name: str) -> pa.Array:
    if pa.types.is_float16(column.type):
        column = column.cast(pa.float32())
    column = pc.if_else(pc.is_nan(column), None, column)
    whole = pc.and_(pc.equal(pc.round(column), column), pc.less(pc.abs(column), _EXACT))
    if pc.any(pc.greater_equal(pc.abs(column), _EXACT)).as_py():
        raise InputError(f"column {name!r} holds ids of 2^53 or more as {column.type}: digits are lost")
    integers = pc.cast(pc.if_else(whole, column, 0.0), pa.int64())
    return pc.if_else(whole, pc.cast(integers, pa.string()), pc.cast(column, pa.string()))


def _only_whole(found: Canonical) -> Canonical:
    """Of identity's text only whole numbers of 0 or more are good."""
    digits = pc.fill_null(pc.match_substring_regex(found.values, r"^\d{1,18}$"), True)
    bad_N = pc.invert(digits).to_numpy(zero_copy_only=False)
    if not bad_N.any():
        return found
    return Canonical(pc.if_else(digits, found.values, None), bad_N, "is no whole number of 0 or more")


def as_numbers(column: pa.Array, name: str) -> Canonical:
    """Doubles; NaN is missing, and text that is no finite number is bad."""
    if pa.types.is_string(column.type):
        column, broken_N = sound_text(column)
        text = pl.Series(column, dtype=pl.String).str.strip_chars()
        numbers = text.cast(pl.Float64, strict=False)
        unread = (numbers.is_null() & text.is_not_null() & (text != "")) | ~numbers.is_finite().fill_null(True)
        values, bad_N = numbers.to_arrow(), unread.to_numpy()
        bad_N = bad_N if broken_N is None else bad_N | broken_N
    else:
        try:
            values = pc.cast(column, pa.float64(), safe=False)  # integers above 2⁵³ lose their last digits
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise InputError(f"column {name!r} holds {column.type}, which is not numeric") from None
        values = pc.if_else(pc.is_nan(values), None, values)
        bad_N = pc.fill_null(pc.is_inf(values), False).to_numpy(zero_copy_only=False)
    return Canonical(values, bad_N if bad_N.any() else None, "is not a finite number")


def _as_lists(column: pa.Array, field: ListField, encoder: str) -> Canonical:
    """list<string> without empty items, cut to max_length; an empty list is null."""
    if pa.types.is_list(column.type):
        starts = _starts(pc.fill_null(pc.list_value_length(column), 0).to_numpy())
        flat = as_strings(pc.list_flatten(column), field.name)
    elif pa.types.is_string(column.type):
        text = pl.Series("items", column, dtype=pl.String)
        items = text.str.split(field.separator) if field.separator else text.reshape((-1, 1)).arr.to_list()
        starts = _starts(items.list.len().fill_null(0).to_numpy())
        flat = clean_text(items.explode(keep_nulls=False, empty_as_null=False).to_arrow().cast(pa.string()))
    elif pa.types.is_null(column.type):
        return Canonical(pa.nulls(len(column), pa.list_(pa.string())))
    else:
        raise InputError(f"column {field.name!r} holds {column.type}; a list field takes lists or text")
    flat = _only_whole(flat) if encoder == "identity" and flat.bad_N is None else flat
    bad_N = None if flat.bad_N is None else np.add.reduceat(np.append(flat.bad_N, False), starts[:-1]) > 0
    if bad_N is not None:
        bad_N &= np.diff(starts) > 0
    return Canonical(_regroup(flat.values, starts, field), bad_N, flat.rule)


def _starts(length_N: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(length_N, dtype=np.int64)])


def _regroup(items: pa.Array, starts: npt.NDArray[np.int64], field: ListField) -> pa.Array:
    """Lists of the non-null items, the first or last `max_length` of each; null where none is left."""
    good_I = items.is_valid().to_numpy(zero_copy_only=False) if items.null_count else None
    kept_I, length_N = kept_items(good_I, np.diff(starts), field)
    if kept_I is not None:
        items = items.filter(pa.array(kept_I))
    offsets = pa.array(_starts(length_N), pa.int32())
    return pa.ListArray.from_arrays(offsets, items, mask=pa.array(length_N == 0))


def kept_items(
    good_I: BoolN | None, length_N: npt.NDArray[np.int64], field: ListField
) -> tuple[BoolN | None, npt.NDArray[np.int64]]:
    """Which items of lists a field keeps (None: all), the first or last `max_length` good ones, and how many a list.

    Args:
        good_I: which items there are at all (None: all).
        length_N: how many items each list has.
        field: the field.
    """
    if good_I is not None:
        row_I = np.repeat(np.arange(len(length_N)), length_N)[good_I]
        length_N = np.bincount(row_I, minlength=len(length_N))
    if not len(length_N) or length_N.max() <= field.max_length:
        return good_I, length_N
    ends_N = np.cumsum(length_N)
    place_I = np.arange(ends_N[-1]) - np.repeat(ends_N - length_N, length_N)
    from_end_I = np.repeat(length_N, length_N) - 1 - place_I
    kept_I = (place_I if field.keep == "first" else from_end_I) < field.max_length
    if good_I is not None:
        both_I = good_I.copy()
        both_I[good_I] = kept_I
        kept_I = both_I
    return kept_I, np.minimum(length_N, field.max_length)
