"""Row quality: a chunk of raw rows into canonical columns, with the rows that break a rule set aside."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.chunks import BadRow, RawChunk
from features.columns import BoolN, as_numbers, as_strings, canonical, column_of, plain, with_default
from features.dataset import GROUP, LABEL, LINE, TIME, WEIGHT
from features.errors import InputError
from features.fields import CrossField, DateField
from features.schema import Schema
from features.times import as_seconds
from features.utf8 import shown


class _Checker:
    """Collects the reasons why rows of a chunk are bad; the first reason of a row is the one reported."""

    def __init__(self, raw: RawChunk) -> None:
        self._raw = raw
        self.good_N: BoolN = np.ones(raw.table.num_rows, bool)
        self.bad_rows = list(raw.bad_rows)

    def reject(self, bad_N: npt.NDArray[np.bool_], column: str, rule: str) -> None:
        """Set aside the rows of `bad_N` that were good so far."""
        rows = np.flatnonzero(bad_N & self.good_N)
        if not rows.size:
            return
        values = shown(column_of(self._raw.table, column), rows)
        lines = self._raw.line_N[rows].tolist()
        self.bad_rows += [
            BadRow(self._raw.path, line, column, value, rule) for line, value in zip(lines, values, strict=True)
        ]
        self.good_N &= ~bad_N


def check_chunk(raw: RawChunk, schema: Schema) -> tuple[pa.Table, list[BadRow]]:
    """Canonical columns of a chunk's good rows (fields, label, weight, time, group, line), and its bad rows.

    Raises:
        InputError: a column can never hold what the schema says.
    """
    try:
        return _checked(raw, schema)
    except InputError as error:
        raise InputError(f"input {raw.path}: {error}") from None


def check_fields(raw: RawChunk, schema: Schema) -> tuple[dict[str, pa.Array], BoolN, list[BadRow]]:
    """Canonical columns of a chunk's good rows by the fields' names, which rows are good [N], and the bad ones.

    No label is needed; training-only fields hold their defaults, whatever the rows say.

    Raises:
        InputError: a column is missing, or can never hold what the schema says.
    """
    checker = _Checker(raw)
    served = raw.table.drop_columns([name for name in schema.training_only if name in raw.table.column_names])
    try:
        columns = _fields(served, schema, checker)
    except InputError as error:
        raise InputError(f"input {raw.path}: {error}") from None
    if not checker.good_N.all():
        good = pa.array(checker.good_N)
        columns = {name: values.filter(good) for name, values in columns.items()}
    return columns, checker.good_N, checker.bad_rows


def _fields(table: pa.Table, schema: Schema, checker: _Checker) -> dict[str, pa.Array]:
    columns: dict[str, pa.Array] = {}
    for field in schema.fields:
        if isinstance(field, CrossField):
            continue
        found = canonical(with_default(table, field), field, schema.encoder_of(field))
        columns[field.name] = found.values
        if found.bad_N is not None:
            checker.reject(found.bad_N, field.from_ if isinstance(field, DateField) else field.name, found.rule)
    return columns


def _checked(raw: RawChunk, schema: Schema) -> tuple[pa.Table, list[BadRow]]:
    checker, table = _Checker(raw), raw.table
    columns = _fields(table, schema, checker)
    columns[LABEL] = _labels(table, schema, checker)
    columns[WEIGHT] = _weights(table, schema, checker)
    columns[TIME] = _times(table, schema, checker)
    columns[GROUP] = _groups(table, schema, checker)
    columns[LINE] = pa.array(raw.line_N)
    checked = pa.table(columns)
    return checked if checker.good_N.all() else checked.filter(pa.array(checker.good_N)), checker.bad_rows


def _numbers(table: pa.Table, column: str, checker: _Checker) -> pa.Array:
    values, bad_N, rule = as_numbers(plain(column_of(table, column)), column)
    if bad_N is not None:
        checker.reject(bad_N, column, rule)
    return values


def _labels(table: pa.Table, schema: Schema, checker: _Checker) -> pa.Array:
    column = schema.label.column
    numbers = _numbers(table, column, checker)
    checker.reject(numbers.is_null().to_numpy(zero_copy_only=False), column, "is no label")
    label_N = pc.fill_null(numbers, 0.0).to_numpy(zero_copy_only=False)
    comparison = schema.label.comparison
    if comparison is None:
        outside_N = (label_N != 0) & (label_N != 1)
        checker.reject(outside_N, column, "is neither 0 nor 1; set label.positive, such as '>= 4', for other numbers")
    else:
        compare, bound = comparison
        label_N = compare(label_N, bound)
    return pa.array(label_N.astype(np.float32))


def _weights(table: pa.Table, schema: Schema, checker: _Checker) -> pa.Array:
    if schema.weight is None:
        return pa.array(np.ones(table.num_rows, np.float32))
    weight_N = pc.fill_null(_numbers(table, schema.weight, checker), -1.0).to_numpy(zero_copy_only=False)
    largest = float(np.finfo(np.float32).max)
    checker.reject((weight_N < 0) | (weight_N > largest), schema.weight, "is no weight of 0 or more")
    return pa.array(np.clip(weight_N, 0.0, largest).astype(np.float32))


def _times(table: pa.Table, schema: Schema, checker: _Checker) -> pa.Array:
    if schema.time is None:
        return pa.nulls(table.num_rows, pa.float64())
    name = schema.time.column
    seconds, bad_N = as_seconds(plain(column_of(table, name)), name, schema.time.format)
    missing_N = seconds.is_null().to_numpy(zero_copy_only=False)
    checker.reject(missing_N if bad_N is None else missing_N | bad_N, name, "is no time")
    return seconds


def _groups(table: pa.Table, schema: Schema, checker: _Checker) -> pa.Array:
    if schema.group is None:
        return pa.nulls(table.num_rows, pa.string())
    found = as_strings(plain(column_of(table, schema.group)), schema.group)
    if found.bad_N is not None:
        checker.reject(found.bad_N, schema.group, found.rule)
    return found.values


def quarantine_table(bad_rows: list[BadRow]) -> pa.Table:
    """Bad rows as a table: file, line, column, reason."""
    return pa.table(
        {
            "file": pa.array([bad.file for bad in bad_rows], pa.string()),
            "line": pa.array([bad.line for bad in bad_rows], pa.int64()),
            "column": pa.array([bad.column for bad in bad_rows], pa.string()),
            "reason": pa.array([bad.reason for bad in bad_rows], pa.string()),
        }
    )
