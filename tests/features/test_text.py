"""Delimited text of any kind: which rows come out, and where the others are said to be."""

import csv
import gzip
import io
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from features import sources, text, units
from features.chunks import BadRow
from features.errors import InputError
from features.schema import Csv
from features.sources import find_sources
from features.units import plan_units, read_source, read_unit

COMMA = Csv()


def read(path: Path, layout: Csv = COMMA) -> tuple[dict[str, list[str | None]], list[int], list[BadRow]]:
    (source,) = find_sources([str(path)])
    chunks = list(read_source(source, layout))
    table = pa.concat_tables([chunk.table for chunk in chunks])
    lines = [int(line) for chunk in chunks for line in chunk.line_N]
    return table.to_pydict(), lines, list(chain.from_iterable(chunk.bad_rows for chunk in chunks))


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_quoting_is_as_the_csv_module_has_it(tmp_path: Path) -> None:
    rows = [["plain", "a,b", 'say "hi"'], ["", "ü", "'x'"], ["  pad ", '"', ","]]
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([["a", "b", "c"], *rows])
    columns, lines, bad = read(write(tmp_path / "a.csv", file.getvalue().encode()))
    assert [list(row) for row in zip(*columns.values(), strict=True)] == rows
    assert lines == [2, 3, 4]
    assert not bad


@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [b"", b"\n"])
def test_line_ends_and_blank_lines(tmp_path: Path, ends: bytes, last: bytes) -> None:
    data = ends.join([b"", b"a,b", b"1,2", b"", b"3,4", b"", b"", b"5,6"])[len(ends) :] + (ends if last else b"")
    columns, lines, bad = read(write(tmp_path / "a.csv", data))
    assert columns == {"a": ["1", "3", "5"], "b": ["2", "4", "6"]}
    assert lines == [2, 4, 7]
    assert not bad


def test_every_kind_of_broken_line_is_set_aside_with_its_number(tmp_path: Path) -> None:
    lines = [b"a,b"] + [b"%d,x" % n for n in range(2, 100)]
    broken = {
        10: (b"1,2,3", "3 columns where 2 were expected"),
        20: (b"alone", "1 columns where 2 were expected"),
        30: (b"nul\0,x", "it contains a NUL"),
        40: (b"bad\xff\xfe,x", "it is not UTF-8"),
        50: (b"mac\rline,x", "it contains a carriage return"),
        60: (b'5,"open', "its quotation marks do not match; set csv.quote to null if they are plain characters"),
    }
    for number, (line, _) in broken.items():
        lines[number - 1] = line
    columns, kept, bad = read(write(tmp_path / "a.csv", b"\n".join(lines)))
    assert {row.line: row.rule for row in bad} == {number: rule for number, (_, rule) in broken.items()}
    assert kept == [n for n in range(2, 100) if n not in broken]
    assert columns["a"] == [str(n) for n in kept]


def test_without_quoting_a_quotation_mark_is_a_character(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", b'a\tb\n5" pipe\t"open\n"x"\ty\n')
    columns, _, bad = read(path, Csv(separator="\t", quote=None))
    assert columns == {"a": ['5" pipe', '"x"'], "b": ['"open', "y"]}
    assert not bad


def test_one_column(tmp_path: Path) -> None:
    columns, lines, bad = read(write(tmp_path / "a.csv", b'a\nx\n"y"\nz'))
    assert (columns, lines, bad) == ({"a": ["x", "y", "z"]}, [2, 3, 4], [])


@pytest.mark.parametrize(("suffix", "compression"), [("", None), (".gz", "gzip"), (".zst", "zstd")])
def test_packed_and_plain_files_are_read_alike(tmp_path: Path, suffix: str, compression: str | None) -> None:
    data = b"a,b\n" + b"".join(b"%d,%d\n" % (n, n * n) for n in range(50_000))
    with pa.output_stream(str(tmp_path / f"a.csv{suffix}"), compression=compression) as file:
        file.write(data)
    columns, lines, bad = read(tmp_path / f"a.csv{suffix}")
    assert columns["b"] == [str(n * n) for n in range(50_000)]
    assert lines == list(range(2, 50_002))
    assert not bad


@pytest.mark.parametrize(("unit", "block"), [(50, 30), (64, 4096), (7, 7), (1000, 1), (10_000, 100)])
def test_rows_do_not_depend_on_where_the_text_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: int, block: int
) -> None:
    random = np.random.default_rng(3)
    rows = [f"{n},{'x' * int(random.integers(0, 40))}" for n in range(300)]
    rows[100] = "only-one-column"
    rows[200] = ""
    path = write(tmp_path / "a.csv", ("a,b\n" + "\n".join(rows)).encode())
    whole = read(path)
    monkeypatch.setattr(units, "UNIT_BYTES", unit)
    monkeypatch.setattr(text, "BLOCK_BYTES", block)
    cut = read(path)
    assert cut == whole
    assert len(whole[1]) == 298
    (source,) = find_sources([str(path)])
    parts = plan_units([source])
    assert len(parts) == -(-path.stat().st_size // unit)
    alone = [
        row for part in parts[::-1] for chunk in read_unit(source, part, COMMA) for row in chunk.table["a"].to_pylist()
    ]
    assert sorted(alone) == sorted(whole[0]["a"])


def test_a_line_longer_than_a_block_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(text, "BLOCK_BYTES", 100)
    with pytest.raises(InputError, match=r"a\.csv cannot be read as delimited text: a line is longer than 1000"):
        read(write(tmp_path / "a.csv", b"a,b\n1," + b"x" * 5000 + b"\n2,y\n"))


def test_truncated_gzip_is_told(tmp_path: Path) -> None:
    packed = gzip.compress(b"a,b\n" + b"1,2\n" * 100_000)
    with pytest.raises(InputError, match=r"a\.csv\.gz cannot be read as delimited text"):
        read(write(tmp_path / "a.csv.gz", packed[: len(packed) // 2]))


def test_folders_of_partitions_give_columns(tmp_path: Path) -> None:
    for day, city in (("2026-01-01", "K%C3%B6ln"), ("2026-01-02", "__HIVE_DEFAULT_PARTITION__")):
        folder = tmp_path / f"dt={day}" / f"city={city}"
        folder.mkdir(parents=True)
        write(folder / "part.csv", b"a\n1\n2\n")
    found = find_sources([str(tmp_path)])
    chunks = [chunk for source in found for chunk in read_source(source, COMMA)]
    table = pa.concat_tables([chunk.table for chunk in chunks])
    assert table["dt"].to_pylist() == ["2026-01-01"] * 2 + ["2026-01-02"] * 2
    assert table["city"].to_pylist() == ["Köln", "Köln", None, None]
    (tmp_path / "a=3").mkdir()
    write(tmp_path / "a=3" / "part.csv", b"a\n1\n")
    with pytest.raises(InputError, match="column 'a' in its rows and in its folder's name"):
        list(read_source(find_sources([str(tmp_path)])[0], COMMA))
    # a folder above what was named is nobody's column
    assert find_sources([str(tmp_path / "a=3" / "part.csv")])[0].partitions == ()
    twice = tmp_path / "u=1" / "u=2"
    twice.mkdir(parents=True)
    write(twice / "part.csv", b"a\n1\n")
    with pytest.raises(InputError, match="two of its folders are named after the same column"):
        find_sources([str(tmp_path)])


def test_addresses_of_this_machine_are_its_paths(tmp_path: Path) -> None:
    for name in ("x y", "z"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.csv", b"a\n1\n")
    expected = [str(tmp_path / name / "a.csv") for name in ("x y", "z")]
    for address in (f"file://{tmp_path}", f"file://{tmp_path}/*/a.csv", f"file://{tmp_path}/**/*.csv"):
        assert [source.path for source in find_sources([address])] == expected
    assert [source.path for source in find_sources([f"file://{tmp_path}/x%20y/a.csv"])] == expected[:1]
    with pytest.raises(InputError, match="is named twice"):
        find_sources([f"file://{tmp_path}/z/a.csv", str(tmp_path / "z" / "a.csv")])


def test_object_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of a bucket, which here is a folder behind Arrow's file system interface."""
    for day in ("dt=1", "dt=2"):
        (tmp_path / "bucket" / "logs 1" / day).mkdir(parents=True)
        write(tmp_path / "bucket" / "logs 1" / day / "a.csv", b"a\n1\n")
    bucket = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())

    def from_uri(address: str) -> tuple[pafs.FileSystem, str]:
        plain = unquote(address.split("?")[0])
        assert plain.startswith("s3://")
        return bucket, plain.removeprefix("s3://")

    monkeypatch.setattr(sources.pafs, "FileSystem", SimpleNamespace(from_uri=from_uri))
    expected = [f"s3://bucket/logs%201/dt%3D{n}/a.csv?region=x" for n in (1, 2)]
    for address in (
        "s3://bucket/logs%201?region=x",
        "s3://bucket/logs%201/*/a.csv?region=x",
        "s3://bucket/**/*.csv?region=x",
    ):
        found = find_sources([address])
        assert [source.path for source in found] == expected
        chunks = [next(iter(read_source(source, COMMA))) for source in found]
        assert [chunk.table.to_pydict() for chunk in chunks] == [{"a": ["1"], "dt": [day]} for day in ("1", "2")]
    with pytest.raises(InputError, match="names no file"):
        find_sources(["s3://bucket/*.parquet"])


def test_an_address_of_nothing_known_is_told() -> None:
    with pytest.raises(InputError, match="no address of a file system"):
        find_sources(["nowhere://bucket/x.csv"])


def test_a_parquet_file_without_rows_is_read_as_such(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert list(read_source(find_sources([str(tmp_path)])[0], COMMA)) == []
