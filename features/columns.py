"""Raw columns of any origin into one canonical form, so that CSV, Parquet, pandas and JSON rows encode alike.

categorical → string, list → list<string>, numeric → double; null is missing everywhere, and so is empty text.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import InputError
from features.schema import CategoricalField, ListField, NumericField, Schema

_EXACT = 2.0**53  # doubles hold every whole number below

Rows: TypeAlias = pa.Table | pd.DataFrame | Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]
BoolN = npt.NDArray[np.bool_]


class Canonical(NamedTuple):
    """A column in canonical form, and which of its rows could not be read (None when all could)."""

    values: pa.Array
    bad_N: BoolN | None = None


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
        raise InputError(f"rows do not form a table: {' '.join(str(error).split())}") from None


def _frame_column(name: str, column: "pd.Series[Any]") -> pa.Array:
    if column.dtype != object:
        return pa.array(column, from_pandas=True)
    return _array(name, [None if value is pd.NA or value != value else value for value in column.tolist()])


def _array(name: str, values: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        # A column that mixes 7 and "7" is legal for ids, which are compared as text.
        if all(value is None or isinstance(value, (str, int)) for value in values):
            return pa.array([None if value is None else str(value) for value in values], pa.string())
        raise InputError(f"column {name!r} mixes kinds of values that do not go together") from None


def canonical(table: pa.Table, field: CategoricalField | ListField | NumericField) -> Canonical:
    """The field's column of `table` in canonical form.

    Raises:
        InputError: the column is absent, or of a type that can never hold such a field.
    """
    if field.name not in table.column_names:
        raise InputError(f"column {field.name!r} is missing; there are {', '.join(table.column_names)}")
    column = plain(table[field.name])
    if isinstance(field, CategoricalField):
        return Canonical(as_strings(column, field.name))
    if isinstance(field, ListField):
        return Canonical(_as_lists(column, field))
    return as_numbers(column, field.name)


def plain(column: pa.ChunkedArray) -> pa.Array:
    """One array without the encodings that Arrow has for the same values: dictionary, large, view and fixed-size."""
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return array.cast(pa.string())
    if pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return array.cast(pa.list_(kind.value_type))
    return array


def as_strings(column: pa.Array, name: str) -> pa.Array:
    """Text of any scalar column: whole numbers lose their point, "" is null."""
    if pa.types.is_nested(column.type):
        raise InputError(f"column {name!r} holds {column.type}, which is not one value a row")
    if pa.types.is_boolean(column.type):
        return pc.if_else(column, "True", "False")  # as Python and pandas write them
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.and_(pc.equal(pc.round(column), column), pc.less(pc.abs(column), _EXACT))
        if pc.any(pc.greater_equal(pc.abs(column), _EXACT)).as_py():
            raise InputError(f"column {name!r} holds ids of 2^53 or more as {column.type}: digits are lost")
        integers = pc.cast(pc.if_else(whole, column, 0.0), pa.int64())
        return pc.if_else(whole, pc.cast(integers, pa.string()), pc.cast(column, pa.string()))
    try:
        text = pc.cast(column, pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise InputError(f"column {name!r} holds {column.type}, which cannot be read as text") from None
    if pa.types.is_integer(column.type):
        return text
    text = pc.replace_substring_regex(text, r"^(-?\d+)\.0+$", r"\1")  # pandas writes 7 beside a null as 7.0
    return pc.if_else(pc.equal(text, ""), None, text)


def as_numbers(column: pa.Array, name: str) -> Canonical:
    """Doubles; NaN is missing, and text that is no finite number is bad."""
    if pa.types.is_string(column.type):
        text = pc.utf8_trim_whitespace(column)
        text = pc.if_else(pc.equal(text, ""), None, text)
        numbers = pl.Series(text, dtype=pl.String).cast(pl.Float64, strict=False).to_arrow()
        bad = pc.and_(pc.is_valid(text), pc.invert(pc.fill_null(pc.is_finite(numbers), False)))
    else:
        try:
            numbers = pc.cast(column, pa.float64(), safe=False)  # integers above 2⁵³ lose their last digits
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise InputError(f"column {name!r} holds {column.type}, which is not numeric") from None
        numbers = pc.if_else(pc.is_nan(numbers), None, numbers)
        bad = pc.fill_null(pc.is_inf(numbers), False)
    bad_N = bad.to_numpy(zero_copy_only=False)
    return Canonical(numbers, bad_N if bad_N.any() else None)


def _as_lists(column: pa.Array, field: ListField) -> pa.Array:
    """list<string> without empty items, cut to max_length; an empty list is null."""
    if pa.types.is_list(column.type):
        texts = as_strings(column.flatten(), field.name)
        offsets = np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(column), 0).to_numpy())])
        items = pl.Series("items", pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), texts))
    elif pa.types.is_string(column.type):
        text = pl.Series("items", column, dtype=pl.String)
        items = text.str.split(field.separator) if field.separator else text.reshape((-1, 1)).arr.to_list()
    elif pa.types.is_null(column.type):
        items = pl.Series("items", [None] * len(column), dtype=pl.List(pl.String))
    else:
        raise InputError(f"column {field.name!r} holds {column.type}; a list field takes lists or text")
    item = pl.element()
    items = items.list.eval(item.filter(item.is_not_null() & (item != ""))).list.head(field.max_length)
    frame = pl.select(pl.when(items.list.len() > 0).then(items))
    return frame.to_series().to_arrow().cast(pa.list_(pa.string()))


def require_columns(table: pa.Table, schema: Schema, source: str) -> None:
    """InputError unless `table` has every column that the schema reads."""
    missing = [name for name in schema.raw_columns if name not in table.column_names]
    if missing:
        names = ", ".join(repr(name) for name in missing)
        raise InputError(f"{source}: missing column {names}; the file has {', '.join(table.column_names)}")
