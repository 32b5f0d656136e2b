"""From raw files to a prepared data set, and what becomes of rows and files that are wrong."""

import gzip
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.dataset import PreparedDataset
from features.errors import InputError
from features.files import folder_written_whole
from features.prepare import Prepared, prepare
from features.schema import Label, Schema
from features.sources import find_sources
from features.splits import SplitRule
from features.units import read_source

SCHEMA = Schema.model_validate(
    {
        "name": "shop",
        "label": {"column": "stars", "positive": ">= 4"},
        "time": "at",
        "group": "user",
        "weight": "w",
        "csv": {"separator": ";"},
        "fields": [
            {"name": "user", "type": "categorical", "min_count": 1},
            {"name": "price", "type": "numeric", "buckets": 2},
            {"name": "tags", "type": "list", "separator": "|", "min_count": 1},
        ],
    }
)
LINES = ["user;price;tags;stars;at;w"] + [
    f"u{n % 3};{n};t{n % 2}|t9;{n % 6};{1000 - n};{1 + n % 2}" for n in range(100)
]


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def read(path: Path, schema: Schema) -> tuple[pa.Table, list[int]]:
    (source,) = find_sources([str(path)])
    chunks = list(read_source(source, schema.csv))
    return pa.concat_tables([chunk.table for chunk in chunks]), list(chain.from_iterable(c.line_N for c in chunks))


def run(path: Path, out: Path, **options: float) -> Prepared:
    return prepare(SCHEMA, {"input": [str(path)]}, out, split=SplitRule.parse("time:0.8,0.1,0.1"), **options)  # type: ignore[arg-type]


def test_split_by_time_and_contents(tmp_path: Path) -> None:
    done = run(write(tmp_path / "a.csv", LINES), tmp_path / "data")
    assert done.rows == {"train": 80, "valid": 10, "test": 10}
    dataset = PreparedDataset.open(tmp_path / "data")
    train, valid, test = (dataset.split(name) for name in ("train", "valid", "test"))
    assert train["_time"].to_numpy().max() < valid["_time"].to_numpy().min()
    assert valid["_time"].to_numpy().max() < test["_time"].to_numpy().min()
    # time runs against the order of the file, so the training rows are the file's last
    assert train["_line"].to_pylist() == list(range(22, 102))
    first = train.to_pylist()[-1]
    assert first["_time"] == 901
    assert first["_group"] == "u0"
    assert first["_label"] == 0.0
    assert first["_weight"] == 2.0
    labels = {row["_line"]: row["_label"] for part in (train, valid, test) for row in part.to_pylist()}
    assert labels == {n + 2: float(n % 6 >= 4) for n in range(100)}


def test_encoders_see_the_training_split_only(tmp_path: Path) -> None:
    lines = [LINES[0], "late;1;t;5;5000;1", *LINES[1:]]
    run(write(tmp_path / "a.csv", lines), tmp_path / "data")
    dataset = PreparedDataset.open(tmp_path / "data")
    assert {row["_group"]: row["user"] for row in dataset.split("test").to_pylist()}["late"] == 1


def test_random_split_is_a_partition_and_repeatable(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", LINES)
    lines = []
    for name in ("one", "two"):
        prepare(SCHEMA, {"input": [str(path)]}, tmp_path / name, split=SplitRule.parse("random:0.5,0.25,0.25"))
        dataset = PreparedDataset.open(tmp_path / name)
        lines.append([dataset.split(split)["_line"].to_pylist() for split in ("train", "valid", "test")])
    assert lines[0] == lines[1]
    assert [len(part) for part in lines[0]] == [50, 25, 25]
    assert sorted(chain.from_iterable(lines[0])) == list(range(2, 102))


def test_given_splits_and_several_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", LINES[:31])
    second = write(tmp_path / "b.csv", [LINES[0], *LINES[31:61]])
    other = write(tmp_path / "c.csv", [LINES[0], *LINES[61:]])
    last = write(tmp_path / "d.csv", [LINES[0], *LINES[61:]])
    sources = {"train": [str(first), str(second)], "valid": [str(other)], "test": [str(last)]}
    prepare(SCHEMA, sources, tmp_path / "data")
    train = PreparedDataset.open(tmp_path / "data").split("train")
    assert train["_file"].to_pylist() == [0] * 30 + [1] * 30
    test = PreparedDataset.open(tmp_path / "data").split("test")
    assert set(test["_file"].to_pylist()) == {3}


def test_text_compressed_and_parquet_give_the_same_ids(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.csv", LINES)
    packed = tmp_path / "b.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    typed = tmp_path / "c.parquet"
    frame = pd.read_csv(plain, sep=";")
    frame.to_parquet(typed)
    digests = set()
    for path in (plain, packed, typed):
        run(path, tmp_path / f"data-{path.name}")
        dataset = PreparedDataset.open(tmp_path / f"data-{path.name}")
        digests.add((dataset.pipeline.digest, str(dataset.split("train").drop(["_line"]).to_pydict())))
    assert len(digests) == 1


def test_headerless_text_takes_names_from_the_schema(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", ["1\tx", "2\ty"])
    layout = {"separator": "\t", "header": False, "columns": ["n", "word"]}
    fields = [{"name": "word", "type": "categorical"}]
    schema = Schema.model_validate({"name": "t", "label": {"column": "n"}, "csv": layout, "fields": fields})
    table, line_N = read(path, schema)
    assert table.to_pydict() == {"n": ["1", "2"], "word": ["x", "y"]}
    assert line_N == [1, 2]


def test_bad_rows_go_to_quarantine_with_file_line_column_and_reason(tmp_path: Path) -> None:
    lines = LINES * 1
    lines[3] = "u1;cheap;t1;4;998;1"
    lines[5] = "u1;3;t1"
    lines[7] = "u1;3;t1;;994;1"
    lines[9] = "u1;3;t1;5;yesterday;1"
    lines[11] = "u1;3;t1;5;990;-2"
    path = write(tmp_path / "a.csv", lines)
    done = run(path, tmp_path / "data", max_bad_rows=0.05)
    assert done.bad_rows == 5
    assert sum(done.rows.values()) == 95
    bad = pq.read_table(tmp_path / "data" / "quarantine" / "part-00000.parquet").to_pylist()
    assert {row["line"]: row["column"] for row in bad} == {4: "price", 6: "", 8: "stars", 10: "at", 12: "w"}
    assert all(row["file"] == str(path) for row in bad)
    reasons = {row["line"]: row["reason"] for row in bad}
    assert reasons[4] == "'cheap' is not a finite number"
    assert reasons[6] == "3 columns where 6 were expected"
    kept = [PreparedDataset.open(tmp_path / "data").split(s)["_line"].to_pylist() for s in ("train", "valid", "test")]
    assert sorted(chain.from_iterable(kept)) == [n for n in range(2, 102) if n not in {4, 6, 8, 10, 12}]


def test_too_many_bad_rows_stop_and_leave_nothing(tmp_path: Path) -> None:
    lines = [LINES[0], *(line.replace(";", ";x", 1) for line in LINES[1:21]), *LINES[21:]]
    with pytest.raises(InputError, match=r"20 of 100 rows are bad.*20 rows like .*a\.csv:2 column 'price'"):
        run(write(tmp_path / "a.csv", lines), tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_a_label_that_is_not_binary_says_what_to_do(tmp_path: Path) -> None:
    schema = SCHEMA.model_copy(update={"label": Label(column="stars")})
    path = write(tmp_path / "a.csv", LINES)
    with pytest.raises(InputError, match=r"'stars'.*neither 0 nor 1; set label\.positive"):
        prepare(schema, {"input": [str(path)]}, tmp_path / "data", split=SplitRule.parse("time:0.8,0.1,0.1"))


def test_a_missing_column_names_itself_and_the_file(tmp_path: Path) -> None:
    lines = [line.rsplit(";", 1)[0] for line in LINES]
    with pytest.raises(InputError, match=r"a\.csv: missing column 'w'; the file has user, price"):
        run(write(tmp_path / "a.csv", lines), tmp_path / "data")


@pytest.mark.parametrize("lines", [LINES[:1], []])
def test_no_rows_at_all(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(InputError, match=r"no rows|is empty"):
        run(write(tmp_path / "a.csv", lines), tmp_path / "data")


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", LINES[:2])
    with pytest.raises(InputError, match="split 'valid' is empty"):
        run(path, tmp_path / "data")


@pytest.mark.parametrize("text", ["time:0.8,0.1", "alphabet:0.8,0.1,0.1", "time:0.8,0.1,0.2", ""])
def test_a_wrong_split_rule(text: str) -> None:
    with pytest.raises(InputError, match="--split"):
        SplitRule.parse(text)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", LINES)
    run(path, tmp_path / "data")
    before = (tmp_path / "data" / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="exists already"):
        run(path, tmp_path / "data")
    assert (tmp_path / "data" / "manifest.json").read_bytes() == before


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def half_written() -> None:
        with folder_written_whole(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            assert not (tmp_path / "out").exists()
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        half_written()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("source", "told"), [("absent.csv", "names no file"), ("*.csv", "names no file")])
def test_a_source_that_is_not_there(tmp_path: Path, source: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        find_sources([str(tmp_path / source)])


def test_a_file_of_an_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(InputError, match=r"a\.xlsx is neither"):
        find_sources([str(tmp_path)])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match=r"a\.parquet is not a readable Parquet file"):
        read(tmp_path / "a.parquet", SCHEMA)
    (tmp_path / "b.csv").write_bytes(b"us\xff\xfe;price\n1;1\n")
    with pytest.raises(InputError, match=r"b\.csv cannot be read"):
        read(tmp_path / "b.csv", SCHEMA)


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.csv has the column 'user' twice"):
        read(write(tmp_path / "a.csv", ["user;user", "1;2"]), SCHEMA)
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["user", "user"])
    pq.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet has the column 'user' twice"):
        read(tmp_path / "b.parquet", SCHEMA)


@pytest.mark.parametrize("rows", [(500,), (500, 700), (1,), (1000,), (999, 1000), (3, 4, 5, 6, 7)])
@pytest.mark.parametrize("stray", ['"', 'x";"', 'x;"'])
def test_a_stray_quotation_mark_costs_its_own_row_only(tmp_path: Path, rows: tuple[int, ...], stray: str) -> None:
    lines = [LINES[0]] + [f"u;{n};t;5;{n};1" for n in range(1, 1001)]
    for row in rows:
        lines[row] = stray + lines[row]
    done = run(write(tmp_path / "a.csv", lines), tmp_path / "data")
    bad = pq.read_table(tmp_path / "data" / "quarantine").to_pylist()
    assert {row["line"] for row in bad} == {row + 1 for row in rows}
    assert sum(done.rows.values()) == 1000 - len(rows)


def test_the_same_file_twice_is_refused(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.csv", LINES))
    by_glob = str(tmp_path / "*.csv")
    with pytest.raises(InputError, match=r"a\.csv is named twice"):
        prepare(SCHEMA, {"train": [path], "valid": [by_glob], "test": [path]}, tmp_path / "data")
    with pytest.raises(InputError, match=r"a\.csv is named twice"):
        prepare(SCHEMA, {"input": [path, by_glob]}, tmp_path / "data", split=SplitRule.parse("time:0.8,0.1,0.1"))


def test_hidden_folders_are_no_data(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", LINES)
    for hidden in (".checkpoints", "_tmp"):
        (tmp_path / hidden).mkdir()
        write(tmp_path / hidden / "b.csv", LINES)
    assert [source.path for source in find_sources([str(tmp_path)])] == [str(tmp_path / "a.csv")]


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfuser;price\r\nx;1\r\n")
    assert read(tmp_path / "a.csv", SCHEMA)[0].to_pydict() == {"user": ["x"], "price": ["1"]}


def test_a_damaged_data_set_is_refused(tmp_path: Path) -> None:
    run(write(tmp_path / "a.csv", LINES), tmp_path / "data")
    part = tmp_path / "data" / "test" / "part-00000.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    dataset = PreparedDataset.open(tmp_path / "data")
    with pytest.raises(InputError, match=r"part-00000\.parquet is damaged"):
        dataset.split("test")
    part.unlink()
    with pytest.raises(InputError, match="is missing"):
        dataset.split("test")
    (tmp_path / "data" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        PreparedDataset.open(tmp_path / "data")


def test_profile_counts(tmp_path: Path) -> None:
    facts = run(write(tmp_path / "a.csv", LINES), tmp_path / "data").profile
    assert facts["splits"]["train"] == {
        "rows": 80,
        "positives": 26,
        "rate": 26 / 80,
        "time": {"from": 901.0, "to": 980.0},
    }
    top = [["u0", 27], ["u2", 27], ["u1", 26]]  # the rows 20 to 99
    user = facts["fields"]["user"]
    assert user["train"] == {"values": 80, "missing": 0, "unknown": 0, "distinct": 3, "top": top}
    assert facts["fields"]["tags"]["ids"] == 5
    assert facts["fields"]["price"]["train"]["quantiles"][0] == 20.0
    clicks = sum(n % 6 >= 4 for n in range(20, 100))
    assert facts["splits"]["train"]["positives"] == clicks


def test_iso_dates_and_parquet_timestamps_are_seconds(tmp_path: Path) -> None:
    frame = pd.read_csv(write(tmp_path / "a.csv", LINES), sep=";")
    frame["at"] = pd.to_datetime(frame["at"], unit="s", utc=True)
    frame.to_parquet(tmp_path / "b.parquet")
    run(tmp_path / "b.parquet", tmp_path / "typed")
    frame["at"] = frame["at"].dt.strftime("%Y-%m-%dT%H:%M:%SZ")
    frame.to_csv(tmp_path / "c.csv", sep=";", index=False)
    run(tmp_path / "c.csv", tmp_path / "text")
    for name in ("typed", "text"):
        times = PreparedDataset.open(tmp_path / name).split("train")["_time"].to_numpy()
        np.testing.assert_array_equal(times, np.arange(980.0, 900.0, -1))
