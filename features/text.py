"""Delimited text to tables, in blocks of whole lines, whatever is wrong with some of the lines.

A record is one line: a quoted value may not contain a line break, so that text can be cut at any line and one stray
quotation mark costs one row. Lines that cannot be read are set aside with their number and the reason.
"""

from collections.abc import Iterator
from csv import Error as CsvError
from csv import reader

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.fs as pafs

from features.chunks import BadRow, RawChunk
from features.errors import InputError
from features.schema import Csv

BLOCK_BYTES = 16 * 2**20
MAX_LINE_BYTES = 16 * 2**20
_BOM = b"\xef\xbb\xbf"
_QUOTES = "its quotation marks do not match; set csv.quote to null if they are plain characters"

LinesN = npt.NDArray[np.int64]


def header(filesystem: pafs.FileSystem, path: str, layout: Csv) -> list[str]:
    """The column names in a file's first line."""
    with filesystem.open_input_stream(path) as stream:
        line = _rest_of_line(stream).decode("utf-8-sig").rstrip("\r\n")
    try:
        names = next(reader([line], delimiter=layout.separator, quotechar=layout.quote), [])
    except CsvError as error:
        raise ValueError(f"its first line: {error}") from None
    if not names:
        raise InputError(f"input {path} is empty; its first line must name the columns")
    return names


def text_chunks(
    filesystem: pafs.FileSystem,
    path: str,
    part: tuple[int, int] | None,
    layout: Csv,
    names: list[str],
    columns: list[str] | None,
    told: str,
) -> Iterator[RawChunk]:
    """Tables of text columns for the lines that begin within the bytes of `part` (None: all of a compressed file)."""
    first = part is None or part[0] == 0
    end_line = 0
    for block in _blocks(filesystem, path, part):
        if first:
            block = block.removeprefix(_BOM)
        skip = int(first and layout.header)
        first = False
        lines = _Lines(block, end_line + 1, told)
        lines.drop(np.arange(lines.count) < skip)
        table, line_N = _parse(lines, layout, names, columns)
        end_line += lines.count
        yield RawChunk(told, table, line_N, lines.bad_rows, end_line)


def _blocks(filesystem: pafs.FileSystem, path: str, part: tuple[int, int] | None) -> Iterator[bytes]:
    """Whole lines, about BLOCK_BYTES at a time; at least one block, which may be empty."""
    if part is None:
        with filesystem.open_input_stream(path) as stream:
            yield from _cut(stream, None)
        return
    start, end = part
    with filesystem.open_input_file(path) as file:
        if start:  # the line that runs across the start belongs to the part before
            file.seek(start - 1)
            start += len(_rest_of_line(file)) - 1
            file.seek(start)
        yield from _cut(file, end - start)


def _cut(stream: pa.NativeFile, left: int | None) -> Iterator[bytes]:
    carry = b""
    while left is None or left > 0:
        block = stream.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left))
        if not block:
            break
        left = None if left is None else left - len(block)
        if left is not None and left <= 0 and not block.endswith(b"\n"):
            block += _rest_of_line(stream)
        cut = block.rfind(b"\n") + 1
        if not cut:
            carry += block
            if len(carry) > MAX_LINE_BYTES:
                raise ValueError(f"a line is longer than {MAX_LINE_BYTES} bytes")
            continue
        yield b"".join((carry, memoryview(block)[:cut]))
        carry = block[cut:]
    yield carry


def _rest_of_line(stream: pa.NativeFile) -> bytes:
    rest = b""
    while b"\n" not in rest:
        more = stream.read(2**16)
        if not more:
            return rest
        rest += more
        if len(rest) > MAX_LINE_BYTES:
            raise ValueError(f"a line is longer than {MAX_LINE_BYTES} bytes")
    return rest[: rest.index(b"\n") + 1]


class _Lines:
    """The lines of a block: which are still to be parsed, and which were set aside."""

    def __init__(self, block: bytes, first_line: int, path: str) -> None:
        self._path = path
        self.block = block + b"\n" if block and not block.endswith(b"\n") else block
        self.count = self.block.count(b"\n")
        self.line_N: LinesN = np.arange(first_line, first_line + self.count)
        self._kept_N = np.ones(self.count, bool)
        self.bad_rows: list[BadRow] = []
        self._byte_checks()

    @property
    def ends(self) -> LinesN:
        """Where each line of the block ends, its line break included."""
        return np.flatnonzero(np.frombuffer(self.block, np.uint8) == 10) + 1

    def drop(self, bad_N: npt.NDArray[np.bool_], rule: str = "") -> None:
        """Leave lines out; with a rule they go among the bad rows."""
        if rule:
            self.drop_lines(self.line_N[bad_N & self._kept_N], rule)
        self._kept_N &= ~bad_N

    def drop_lines(self, line_B: LinesN, rule: str) -> None:
        """Put the lines with these numbers among the bad rows."""
        self.bad_rows += [BadRow(self._path, line, "", "", rule) for line in line_B.tolist()]

    def kept(self) -> tuple[bytes, LinesN]:
        """The lines left, and their numbers."""
        if self._kept_N.all():
            return self.block, self.line_N
        lengths = np.diff(self.ends, prepend=0)
        chosen = np.frombuffer(self.block, np.uint8)[np.repeat(self._kept_N, lengths)]
        return chosen.tobytes(), self.line_N[self._kept_N]

    def _byte_checks(self) -> None:
        """NUL, lone carriage returns and broken UTF-8, each looked for at the speed of a memory scan."""
        block = self.block
        if b"\0" in block:
            self.drop(self._lines_with(np.frombuffer(block, np.uint8) == 0), "it contains a NUL")
        if b"\r" in block and block.count(b"\r") != block.count(b"\r\n"):
            data = np.frombuffer(block, np.uint8)
            lone = (data == 13) & (np.append(data[1:], np.uint8(0)) != 10)
            self.drop(self._lines_with(lone), "it contains a carriage return")
        if not _is_utf8(block):
            bad = [not _is_utf8(line) for line in block.split(b"\n")[: self.count]]
            self.drop(np.array(bad, bool), "it is not UTF-8")

    def _lines_with(self, found: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        has_N = np.zeros(self.count, bool)
        has_N[np.searchsorted(self.ends, np.flatnonzero(found), side="right")] = True
        return has_N


def _is_utf8(data: bytes) -> bool:
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _parse(lines: _Lines, layout: Csv, names: list[str], columns: list[str] | None) -> tuple[pa.Table, LinesN]:
    """The table of the lines left, and each row's line; lines that do not have every column are set aside."""
    data, line_N = lines.kept()
    tables, numbers = [], []
    todo = [(data, line_N)]
    while todo:
        data, line_N = todo.pop()
        table, wrong = _read(data, layout, names, columns)
        if table.num_rows + len(wrong) == len(line_N):
            rows = np.fromiter(wrong, np.int64, len(wrong))
            for found in sorted(set(wrong.values())):
                chosen = rows[np.fromiter(wrong.values(), np.int64, len(wrong)) == found]
                lines.drop_lines(line_N[chosen], f"{found} columns where {len(names)} were expected")
            table, line_N = _without_blank_lines(table, np.delete(line_N, rows), data, rows)
            tables.append(table)
            numbers.append(line_N)
        elif len(line_N) == 1:
            lines.drop_lines(line_N, _QUOTES)
        else:  # a quoted value runs over several lines: look for the line it begins in
            half = len(line_N) // 2
            cut = int((np.flatnonzero(np.frombuffer(data, np.uint8) == 10) + 1)[half - 1])
            todo += [(data[cut:], line_N[half:]), (data[:cut], line_N[:half])]
    if not tables:
        return _read(b"", layout, names, columns)[0], line_N[:0]
    return pa.concat_tables(tables), np.concatenate(numbers)


def _without_blank_lines(table: pa.Table, line_N: LinesN, data: bytes, wrong: LinesN) -> tuple[pa.Table, LinesN]:
    """Without the rows of empty values that stand for blank lines; `wrong` are the lines of `data` that are no rows."""
    if not table.num_columns:
        return table, line_N
    ends_N = pc.and_(pc.equal(table[0], ""), pc.equal(table[table.num_columns - 1], ""))
    if not pc.any(ends_N).as_py():
        return table, line_N
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 10) + 1
    lengths = np.diff(ends, prepend=0) - (np.frombuffer(data, np.uint8)[np.maximum(ends - 2, 0)] == 13)
    full_N = np.delete(lengths, wrong) > 1
    return table.filter(pa.array(full_N)), line_N[full_N]


def _read(data: bytes, layout: Csv, names: list[str], columns: list[str] | None) -> tuple[pa.Table, dict[int, int]]:
    """Rows as columns of text, and by number how many columns other rows have; a blank line is a row of empty values.

    A row of empty values is added at the end: where it does not come out as a row, a quotation mark has swallowed it.
    """
    wrong: dict[int, int] = {}

    def set_aside(row: csv.InvalidRow) -> str:
        wrong[(row.number or 1) - 1] = row.actual_columns
        return "skip"

    last = layout.separator.encode() * (len(names) - 1) + b"\n"
    table = csv.read_csv(
        pa.BufferReader(data + last),
        # one thread, or Arrow does not number the rows it sets aside
        read_options=csv.ReadOptions(column_names=names, use_threads=False, block_size=2**30),
        parse_options=csv.ParseOptions(
            delimiter=layout.separator,
            quote_char=layout.quote or False,
            ignore_empty_lines=False,
            invalid_row_handler=set_aside,
        ),
        convert_options=csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), include_columns=columns or [], check_utf8=False
        ),
    )
    return table.slice(0, table.num_rows - 1) if table.num_rows else table, wrong
