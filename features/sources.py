"""Raw files into Arrow tables: CSV and TSV (plain, gzip, zstd) and Parquet; a file, a folder or a glob."""

import glob
import io
from csv import Error as CsvError
from csv import reader
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from features.errors import InputError
from features.schema import Schema

_TEXT = (".csv", ".tsv", ".txt")
_PACKED = (".gz", ".zst")
_SPANS = "a quoted value goes on over several lines: is a quotation mark missing or too many?"


@dataclass(frozen=True)
class BadRow:
    """A raw row that is set aside: where it stands and which rule it breaks.

    `line` counts records from 1, a header included: the line in the file, unless blank lines stand before it.
    """

    file: str
    line: int
    column: str
    reason: str


@dataclass(frozen=True)
class RawFile:
    """A file's rows. `line_N` is each row's line in a text file, or its number from 1 in a Parquet file."""

    path: Path
    table: pa.Table
    line_N: pa.Array
    bad_rows: list[BadRow]


def find_files(sources: list[str]) -> list[Path]:
    """The files that `sources` name, in sorted order for a folder or a glob.

    Raises:
        InputError: a source names nothing, or a file of a kind that cannot be read.
    """
    found: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            inside = (file for file in path.rglob("*") if file.is_file())
            files = sorted(file for file in inside if not _is_hidden(file.relative_to(path)))
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(source, recursive=True))
        if not files:
            raise InputError(f"input {source} names no file")
        found.extend(files)
    refuse_twice(found)
    for file in found:
        if _kind(file) is None:
            raise InputError(f"input {file} is neither .parquet nor {', '.join(_TEXT)} (plain, .gz or .zst)")
    return found


def refuse_twice(files: list[Path]) -> None:
    """InputError for a file that is named twice: its rows would count twice, or stand in two splits."""
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise InputError(f"input {file} is named twice")
        seen.add(file.resolve())


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)  # as Spark and Arrow have it


def _kind(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes[-2:] if suffix not in _PACKED]
    last = suffixes[-1].lower() if suffixes else ""
    return "parquet" if last == ".parquet" else "text" if last in _TEXT else None


def read_file(path: Path, schema: Schema) -> RawFile:
    """Read one raw file; rows with a wrong number of columns are set aside, anything worse is an InputError."""
    if _kind(path) == "text":
        return _read_text(path, schema)
    try:
        _require_distinct(path, pq.read_schema(path).names)
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"input {path} is not a readable Parquet file: {_one_line(error)}") from None
    return RawFile(path, table, pa.array(range(1, table.num_rows + 1), pa.int64()), [])


def _read_text(path: Path, schema: Schema) -> RawFile:
    bad_rows: list[BadRow] = []

    def set_aside(row: csv.InvalidRow) -> str:
        reason = f"{row.actual_columns} columns where {row.expected_columns} were expected"
        if "\n" in (row.text or ""):
            reason = _SPANS
        bad_rows.append(BadRow(str(path), row.number or 0, "", reason))
        return "skip"

    layout = schema.csv
    try:
        names = _header(path, layout.separator) if layout.header else list(layout.columns)
        _require_distinct(path, names)
        table = csv.read_csv(
            path,
            # one thread, or Arrow does not number the rows it sets aside
            read_options=csv.ReadOptions(column_names=names, skip_rows=int(layout.header), use_threads=False),
            parse_options=csv.ParseOptions(delimiter=layout.separator, invalid_row_handler=set_aside),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except InputError:
        raise
    except (OSError, ValueError, CsvError) as error:  # Arrow's own and UnicodeDecodeError are ValueErrors
        raise InputError(f"input {path} cannot be read as delimited text: {_one_line(error)}") from None
    _refuse_rows_that_swallow_others(path, table, bad_rows)
    skipped = {bad.line for bad in bad_rows}
    first = 2 if layout.header else 1
    lines = [line for line in range(first, first + table.num_rows + len(skipped)) if line not in skipped]
    return RawFile(path, table, pa.array(lines, pa.int64()), bad_rows)


def _refuse_rows_that_swallow_others(path: Path, table: pa.Table, bad_rows: list[BadRow]) -> None:
    """A stray quotation mark makes one value of all rows up to the next one; they must not be lost in silence."""
    for bad in bad_rows:
        if bad.reason == _SPANS:
            raise InputError(f"input {path}, line {bad.line}: {_SPANS}")
    for name in table.column_names:
        spanning = pc.match_substring(table[name], "\n")
        if pc.any(spanning).as_py():
            row = spanning.index(True).as_py()
            raise InputError(f"input {path}, data row {row + 1}, column {name!r}: {_SPANS}")


def _header(path: Path, separator: str) -> list[str]:
    with pa.input_stream(str(path), compression="detect") as stream, io.TextIOWrapper(stream, "utf-8-sig") as text:
        names = next(reader(text, delimiter=separator), [])
    if not names:
        raise InputError(f"input {path} is empty; its first line must name the columns")
    return names


def _require_distinct(path: Path, names: list[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"input {path} has the column {twice[0]!r} twice")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
