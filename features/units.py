"""Files cut into units of work, and the rows of a unit chunk by chunk.

A unit is a part of one file that can be read on its own, by any process: a range of bytes of plain text, a range of row
groups of a Parquet file, or the whole of a compressed file. Units depend on the files alone, and a unit's rows on the
unit alone.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.chunks import RawChunk
from features.errors import InputError, listed, one_line
from features.schema import Csv
from features.sources import Source
from features.text import header, text_chunks

UNIT_BYTES = 64 * 2**20  # of plain text or of a Parquet file: what one process reads before it reports
PARQUET_ROWS = 65_536  # of a chunk


@dataclass(frozen=True)
class Unit:
    """A part of the source with number `source`: bytes of text, row groups of Parquet, or all of a compressed file."""

    source: int
    start: int
    end: int


def plan_units(sources: list[Source]) -> list[Unit]:
    """All units, in the order of the files and of their rows."""
    units: list[Unit] = []
    for index, source in enumerate(sources):
        if source.kind == "text":
            starts = range(0, max(source.size, 1), UNIT_BYTES)
            units += [Unit(index, start, min(start + UNIT_BYTES, source.size)) for start in starts]
        elif source.kind == "packed":
            units.append(Unit(index, 0, source.size))
        else:
            units += [Unit(index, first, last) for first, last in _row_group_ranges(source)]
    return units


def _row_group_ranges(source: Source) -> list[tuple[int, int]]:
    metadata = _open_parquet(source).metadata
    ranges, first, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= UNIT_BYTES or group == metadata.num_row_groups - 1:
            ranges.append((first, group + 1))
            first, size = group + 1, 0
    return ranges or [(0, 0)]


def read_unit(
    source: Source, unit: Unit, csv: Csv, columns: tuple[str, ...] | None = None, optional: tuple[str, ...] = ()
) -> Iterator[RawChunk]:
    """The unit's rows in order; lines count from the unit's first.

    Args:
        source: the file that the unit is a part of.
        unit: what to read.
        csv: how text is laid out.
        columns: what to read of it; by default everything.
        optional: those of `columns` that may be absent.

    Raises:
        InputError: the file cannot be read, or lacks one of `columns`.
    """
    read = _parquet_chunks if source.kind == "parquet" else _text
    for chunk in read(source, unit, csv, columns, optional):
        yield _with_partitions(chunk, source, columns)


def read_source(source: Source, csv: Csv) -> Iterator[RawChunk]:
    """All rows of a file in order, with every column; lines count from the file's first."""
    before = 0
    for unit in plan_units([source]):
        lines = 0
        for chunk in read_unit(source, unit, csv):
            yield replace(
                chunk,
                line_N=chunk.line_N + before,
                bad_rows=[replace(bad, line=bad.line + before) for bad in chunk.bad_rows],
            )
            lines = chunk.end_line
        before += lines


def _text(
    source: Source, unit: Unit, csv: Csv, columns: tuple[str, ...] | None, optional: tuple[str, ...]
) -> Iterator[RawChunk]:
    filesystem, path = source.filesystem()
    try:
        names = header(filesystem, path, csv) if csv.header else list(csv.columns)
        own = _own(source, names, columns, optional)
        part = None if source.kind == "packed" else (unit.start, unit.end)
        yield from text_chunks(filesystem, path, part, csv, names, own, source.path)
    except (OSError, ValueError) as error:  # Arrow's own and UnicodeDecodeError are ValueErrors
        if isinstance(error, InputError):
            raise
        raise InputError(f"input {source.path} cannot be read as delimited text: {one_line(error)}") from None


def _open_parquet(source: Source) -> pq.ParquetFile:
    filesystem, path = source.filesystem()
    try:
        return pq.ParquetFile(filesystem.open_input_file(path))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"input {source.path} is not a readable Parquet file: {one_line(error)}") from None


def _parquet_chunks(
    source: Source, unit: Unit, csv: Csv, columns: tuple[str, ...] | None, optional: tuple[str, ...]
) -> Iterator[RawChunk]:
    file = _open_parquet(source)
    own = _own(source, file.schema_arrow.names, columns, optional)
    line = 1
    try:
        groups = list(range(unit.start, unit.end))
        for batch in file.iter_batches(PARQUET_ROWS, groups, columns=own):
            lines = np.arange(line, line + batch.num_rows)
            line += batch.num_rows
            yield RawChunk(source.path, pa.Table.from_batches([batch]), lines, [], line - 1)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"input {source.path} is not a readable Parquet file: {one_line(error)}") from None


def _own(
    source: Source, names: list[str], columns: tuple[str, ...] | None, optional: tuple[str, ...]
) -> list[str] | None:
    """The columns that the file itself has to give (None for all), after checking that it can."""
    known, folders = set(names), {name for name, _ in source.partitions}
    if len(known) < len(names):
        twice = next(name for name, times in Counter(names).items() if times > 1)
        raise InputError(f"input {source.path} has the column {twice!r} twice")
    both = sorted(folders & known)
    if both:
        raise InputError(f"input {source.path} has the column {both[0]!r} in its rows and in its folder's name")
    if columns is None:
        return None
    own = [name for name in columns if name not in folders and (name in known or name not in optional)]
    missing = [name for name in own if name not in known]
    if missing:
        told = ", ".join(repr(name) for name in missing)
        raise InputError(f"input {source.path}: missing column {told}; the file has {listed(names)}")
    return own


def _with_partitions(chunk: RawChunk, source: Source, columns: tuple[str, ...] | None) -> RawChunk:
    table = chunk.table
    for name, value in source.partitions:
        if columns is None or name in columns:
            table = table.append_column(name, pa.repeat(pa.scalar(value, pa.string()), table.num_rows))
    return replace(chunk, table=table)
