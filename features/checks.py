"""Row quality: raw rows into canonical columns, with the rows that break a rule set aside."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.columns import BoolN, as_numbers, as_strings, canonical, plain, require_columns
from features.errors import InputError
from features.schema import Schema
from features.sources import BadRow, RawFile, find_files, read_file

LABEL, WEIGHT, TIME, GROUP, FILE, LINE = "_label", "_weight", "_time", "_group", "_file", "_line"


class RowChecker:
    """Collects the reasons why rows of one file are bad; the first reason of a row is the one reported."""

    def __init__(self, raw: RawFile) -> None:
        self._raw = raw
        self.good_N: BoolN = np.ones(raw.table.num_rows, bool)
        self.bad_rows = list(raw.bad_rows)

    def reject(self, bad_N: npt.NDArray[np.bool_], column: str, rule: str) -> None:
        """Set aside the rows of `bad_N` that were good so far."""
        for row in np.flatnonzero(bad_N & self.good_N):
            value = str(self._raw.table[column][int(row)].as_py())[:80]
            line = self._raw.line_N[int(row)].as_py()
            self.bad_rows.append(BadRow(str(self._raw.path), line, column, f"{value!r} {rule}"))
        self.good_N &= ~bad_N


def check_file(raw: RawFile, file_index: int, schema: Schema) -> tuple[pa.Table, list[BadRow]]:
    """Canonical columns of a file's good rows (fields, then label, weight, time, group and source), and its bad rows.

    Raises:
        InputError: a column that the schema reads is missing, or can never hold what the schema says.
    """
    require_columns(raw.table, schema, f"input {raw.path}")
    try:
        return _checked(raw, file_index, schema)
    except InputError as error:
        raise InputError(f"input {raw.path}: {error}") from None


def _checked(raw: RawFile, file_index: int, schema: Schema) -> tuple[pa.Table, list[BadRow]]:
    checker = RowChecker(raw)
    columns: dict[str, pa.Array] = {}
    for field in schema.fields:
        values, bad_N = canonical(raw.table, field)
        columns[field.name] = values
        if bad_N is not None:
            checker.reject(bad_N, field.name, "is not a finite number")
    columns[LABEL] = _labels(raw.table, schema, checker)
    columns[WEIGHT] = _weights(raw.table, schema, checker)
    columns[TIME] = _times(raw.table, schema, checker)
    group = schema.group
    columns[GROUP] = as_strings(plain(raw.table[group]), group) if group else pa.nulls(len(raw.table), "string")
    columns[FILE] = pa.array(np.full(raw.table.num_rows, file_index, np.int32))
    columns[LINE] = raw.line_N
    return pa.table(columns).filter(pa.array(checker.good_N)), checker.bad_rows


def check_sources(sources: list[str], schema: Schema, max_bad_rows: float) -> tuple[pa.Table, list[BadRow], list[Path]]:
    """Read and check every file that `sources` name.

    Raises:
        InputError: more than the fraction `max_bad_rows` of the rows is bad; names the three most frequent reasons.
    """
    files = find_files(sources)
    checked = [check_file(read_file(path, schema), index, schema) for index, path in enumerate(files)]
    table = pa.concat_tables([good for good, _ in checked])
    bad_rows = [bad for _, bads in checked for bad in bads]
    total = table.num_rows + len(bad_rows)
    if total == 0:
        raise InputError(f"input {', '.join(sources)} has no rows")
    if len(bad_rows) > max_bad_rows * total:
        raise InputError(
            f"{len(bad_rows)} of {total} rows are bad, above --max-bad-rows {max_bad_rows}: {_top_reasons(bad_rows)}"
        )
    return table, bad_rows, files


def groups_of(table: pa.Table) -> np.ndarray | None:
    """The group of each row of a split, None for a row without one; None where the schema has no group."""
    group = table[GROUP]
    return None if group.null_count == len(group) else group.to_numpy()


def quarantine_table(bad_rows: list[BadRow]) -> pa.Table:
    """Bad rows as a table: file, line, column, reason."""
    fields = [("file", pa.string()), ("line", pa.int64()), ("column", pa.string()), ("reason", pa.string())]
    return pa.Table.from_pylist([asdict(bad) for bad in bad_rows], pa.schema(fields))


def _top_reasons(bad_rows: Iterable[BadRow]) -> str:
    def rule(bad: BadRow) -> tuple[str, str]:
        return bad.column, bad.reason.rsplit("' ", 1)[-1]

    first: dict[tuple[str, str], BadRow] = {}
    for bad in bad_rows:
        first.setdefault(rule(bad), bad)
    top = Counter(map(rule, bad_rows)).most_common(3)
    return "; ".join(
        f"{count} rows like {first[key].file}:{first[key].line} {_where(first[key])}" for key, count in top
    )


def _where(bad: BadRow) -> str:
    return f"column {bad.column!r}: {bad.reason}" if bad.column else bad.reason


def _numbers(table: pa.Table, column: str, checker: RowChecker) -> pa.Array:
    values, bad_N = as_numbers(plain(table[column]), column)
    if bad_N is not None:
        checker.reject(bad_N, column, "is not a finite number")
    return values


def _labels(table: pa.Table, schema: Schema, checker: RowChecker) -> pa.Array:
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


def _weights(table: pa.Table, schema: Schema, checker: RowChecker) -> pa.Array:
    if schema.weight is None:
        return pa.array(np.ones(table.num_rows, np.float32))
    weight_N = pc.fill_null(_numbers(table, schema.weight, checker), -1.0).to_numpy(zero_copy_only=False)
    checker.reject(weight_N < 0, schema.weight, "is no weight of 0 or more")
    return pa.array(weight_N.astype(np.float32))


def _times(table: pa.Table, schema: Schema, checker: RowChecker) -> pa.Array:
    """Seconds since 1970 as double: numbers are taken as such, dates and ISO 8601 text are converted."""
    if schema.time is None:
        return pa.nulls(table.num_rows, pa.float64())
    column = plain(table[schema.time])
    if pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
        seconds = pl.Series("time", column).cast(pl.Datetime("us")).dt.timestamp("us").cast(pl.Float64) / 1e6
    elif pa.types.is_string(column.type):
        text = pl.Series("time", column, dtype=pl.String)
        seconds = text.cast(pl.Float64, strict=False)
        if seconds.null_count():
            dates = text.str.to_datetime(time_unit="us", time_zone="UTC", strict=False, format=None, ambiguous="null")
            seconds = seconds.fill_null(dates.dt.timestamp("us").cast(pl.Float64) / 1e6)
    else:
        seconds = pl.Series("time", _numbers(table, schema.time, checker), dtype=pl.Float64)
    checker.reject(~(seconds.is_finite().fill_null(False)).to_numpy(), schema.time, "is no time")
    return seconds.to_arrow()
