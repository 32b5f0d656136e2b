"""Batch scoring: whatever the files, each row's score in its place; what is unfinished is gone on with or refused."""

import fcntl
import gzip
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features import units
from features.engines import LocalEngine
from features.errors import InputError
from features.files import alone, hash_tree
from serving.bundle import Bundle
from serving.scoring import files
from serving.scoring.files import Scored, score_files

ITEMS = 60
UNITS = 6  # that the rows are cut into


@pytest.fixture
def frame() -> pd.DataFrame:
    """Rows in no order, with a column that the model does not read."""
    random.seed(1)
    count = 3000
    return pd.DataFrame(
        {
            "user": [random.choice(["ann", "bob", "eve", ""]) for _ in range(count)],
            "place": range(count),
            "item": [random.randrange(2 * ITEMS) for _ in range(count)],
        }
    )


@pytest.fixture
def bundle(make: Callable[..., Bundle]) -> Bundle:
    return make("model", 1)


@pytest.fixture
def rows(frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The rows as a CSV file of several units."""
    path = tmp_path / "rows.csv"
    frame.to_csv(path, index=False)
    monkeypatch.setattr(units, "UNIT_BYTES", path.stat().st_size // UNITS + 1)
    return path


def expected(bundle: Bundle, frame: pd.DataFrame) -> np.ndarray:
    """Scores by the scorer, of all rows at once as a frame."""
    return bundle.scorer.score(frame[["user", "item"]].assign(item=frame["item"].astype(int)))


def scores(out: Path) -> np.ndarray:
    return pq.read_table(out)["score"].to_numpy()


def work_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def failing(at: int) -> Callable[..., Any]:
    """An engine that dies with the unit number `at`, as a process would."""

    class Dying(LocalEngine):
        def run(self, function: Callable[[int], Any], units: int) -> Any:
            for unit in range(units):
                if unit == at:
                    raise KeyboardInterrupt
                yield from function(unit)

    return lambda workers: Dying(1)


def interrupted(bundle: Bundle, path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, at: int = 3) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files, "LocalEngine", failing(at))
        with pytest.raises(KeyboardInterrupt):
            score_files(bundle, [str(path)], out)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "csv.zst", "parquet"])
def test_rows_keep_their_order_whatever_the_file(
    bundle: Bundle, frame: pd.DataFrame, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch,
    make: Callable[..., Bundle],
) -> None:  # fmt: skip
    path = tmp_path / f"rows.{kind}"
    if kind == "tsv":
        schema = bundle.schema.model_copy(update={"csv": bundle.schema.csv.model_copy(update={"separator": "\t"})})
        bundle = make("tabs", 1, schema=schema)
        frame.to_csv(path, index=False, sep="\t")
    elif kind == "csv.gz":
        path.write_bytes(gzip.compress(frame.to_csv(index=False).encode()))
    elif kind == "csv.zst":
        path.write_bytes(pa.compress(frame.to_csv(index=False).encode(), "zstd", asbytes=True))
    elif kind == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, row_group_size=250)
        monkeypatch.setattr(units, "PARQUET_ROWS", 100)
    monkeypatch.setattr(units, "UNIT_BYTES", 5000)
    assert score_files(bundle, [str(path)], tmp_path / "out") == Scored(len(frame), 0)
    table = pq.read_table(tmp_path / "out")
    assert table.column_names == ["user", "place", "item", "score"]
    assert [int(value) for value in table["place"].to_pylist()] == list(range(len(frame)))
    assert table["user"].to_pylist() == frame["user"].tolist()
    # rows share products with others: those of another number differ in the last bit
    np.testing.assert_allclose(table["score"].to_numpy(), expected(bundle, frame), rtol=0, atol=1e-7)
    parts = len(list((tmp_path / "out").glob("part-*.parquet")))
    assert parts == 1 if kind in ("csv.gz", "csv.zst") else parts > 3


def test_files_of_a_folder_in_order_with_the_columns_of_their_folders(
    bundle: Bundle, frame: pd.DataFrame, tmp_path: Path
) -> None:
    for day, part in (("2026-01-02", frame[1000:]), ("2026-01-01", frame[:1000])):
        (tmp_path / "log" / f"dt={day}").mkdir(parents=True)
        part.to_parquet(tmp_path / "log" / f"dt={day}" / "rows.parquet", index=False)
    done = score_files(bundle, [str(tmp_path / "log")], tmp_path / "out", columns=("place", "dt"))
    assert done.rows == len(frame)
    table = pq.read_table(tmp_path / "out")
    assert table.column_names == ["place", "dt", "score"]
    assert table["place"].to_pylist() == list(range(len(frame)))
    assert table["dt"].to_pylist() == ["2026-01-01"] * 1000 + ["2026-01-02"] * 2000
    np.testing.assert_allclose(table["score"].to_numpy(), expected(bundle, frame), rtol=0, atol=1e-7)


def test_every_part_says_which_model_made_it(bundle: Bundle, rows: Path, tmp_path: Path) -> None:
    score_files(bundle, [str(rows)], tmp_path / "out", version="7")
    parts = sorted((tmp_path / "out").glob("*.parquet"))
    assert len(parts) == UNITS
    for part in parts:
        told = pq.read_metadata(part).metadata
        assert told[b"masknet.name"] == b"small"
        assert told[b"masknet.version"] == b"7"
        assert told[b"masknet.digest"] == bundle.digest.encode()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {part.name for part in parts} | {"_SUCCESS"}
    assert not work_of(tmp_path / "out").exists()


def test_columns_that_cannot_be_kept(bundle: Bundle, frame: pd.DataFrame, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows.csv: missing column 'nobody'; the file has user, place, item"):
        score_files(bundle, [str(rows)], tmp_path / "out", columns=("nobody",))
    with pytest.raises(InputError, match="--columns names 'user' twice"):  # a reader could not tell them apart
        score_files(bundle, [str(rows)], tmp_path / "out", columns=("user", "item", "user"))
    frame.assign(score=0.5).to_parquet(tmp_path / "again.parquet")
    again = [str(tmp_path / "again.parquet")]
    with pytest.raises(InputError, match="already has a column 'score': leave it out with --columns"):
        score_files(bundle, again, tmp_path / "out")
    assert not work_of(tmp_path / "out").exists()  # nothing to go on with
    score_files(bundle, again, tmp_path / "out", columns=("user",))
    np.testing.assert_allclose(scores(tmp_path / "out"), expected(bundle, frame), rtol=0, atol=1e-7)


def test_files_without_rows(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "header.csv").write_text("user,item,extra\n")
    empty = pa.table({"user": pa.array([], pa.string()), "item": pa.array([], pa.int64())})
    pq.write_table(empty, tmp_path / "empty.parquet")
    for name, columns in (
        ("header.csv", ["user", "item", "extra", "score"]),
        ("empty.parquet", ["user", "item", "score"]),
    ):
        out = tmp_path / f"out-{name}"
        assert score_files(bundle, [str(tmp_path / name)], out) == Scored(0, 0)
        assert pq.read_table(out).column_names == columns


def with_bad_rows(rows: Path, *numbers: int) -> None:
    """Break rows, by their numbers from 0: an item that is no number, and every second a line that is too short."""
    lines = rows.read_text().splitlines()
    for place, number in enumerate(numbers):
        lines[number + 1] = f"ann,{number},x{number}" if place % 2 == 0 else "short"
    rows.write_text("\n".join(lines) + "\n")


def test_by_default_every_row_gets_a_score_or_none_does(bundle: Bundle, rows: Path, tmp_path: Path) -> None:
    with_bad_rows(rows, 7)
    told = r"1 of \d+ rows are bad, above --max-bad-rows 0.0: 1 rows like .*rows.csv:9 column 'item': 'x7' is no whole"
    with pytest.raises(InputError, match=told):
        score_files(bundle, [str(rows)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_few_bad_rows_are_set_aside_with_their_lines(
    bundle: Bundle, frame: pd.DataFrame, rows: Path, tmp_path: Path
) -> None:
    bad = [7, 1500, 1501, 2999]
    with_bad_rows(rows, *bad)
    with pytest.raises(InputError, match=r"4 of 3000 rows are bad, above --max-bad-rows 0.001: 2 rows like"):
        score_files(bundle, [str(rows)], tmp_path / "out", max_bad_rows=0.001)
    # what was scored is kept, so that a larger share can be allowed
    done = score_files(bundle, [str(rows)], tmp_path / "out", max_bad_rows=0.01, resume=True)
    assert done == Scored(len(frame) - 4, 4)
    good = frame.drop(index=bad)
    table = pq.read_table(tmp_path / "out")
    assert [int(value) for value in table["place"].to_pylist()] == good["place"].tolist()
    np.testing.assert_allclose(table["score"].to_numpy(), expected(bundle, good), rtol=0, atol=1e-7)
    aside = pq.ParquetDataset(tmp_path / "out" / "_quarantine", ignore_prefixes=["."]).read().to_pylist()
    assert [(row["line"], row["column"], row["reason"]) for row in aside] == [
        (9, "item", "'x7' is no whole number of 0 or more"),
        (1502, "", "1 columns where 3 were expected"),
        (1503, "item", "'x1501' is no whole number of 0 or more"),
        (3001, "", "1 columns where 3 were expected"),
    ]


def test_an_interrupted_scoring_goes_on_where_it_was(
    bundle: Bundle, frame: pd.DataFrame, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    score_files(bundle, [str(rows)], tmp_path / "whole")
    interrupted(bundle, rows, out, monkeypatch)
    parts = work_of(out) / "parts"
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*")}
    assert sorted(before) == [f"part-{unit:05d}.parquet" for unit in range(3)]
    (parts / "part-00001.parquet").write_bytes(b"PAR1 cut off")  # the machine went down
    (parts / ".part-00003.parquet.partial-1").write_bytes(b"half")
    with pytest.raises(InputError, match=r"an unfinished scoring of .*out lies in .*: go on with --resume"):
        score_files(bundle, [str(rows)], out)
    seen: list[tuple[int, int]] = []
    done = score_files(
        bundle, [str(rows)], out, resume=True, progress=lambda stage, done, total: seen.append((done, total))
    )
    assert done == Scored(len(frame), 0)
    assert hash_tree(out) == hash_tree(tmp_path / "whole")
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert {name for name in before if before[name] == after[name]} == {"part-00000.parquet", "part-00002.parquet"}
    assert seen[0] == (2, UNITS)
    assert seen[-1] == (UNITS, UNITS)
    assert all(left[0] <= right[0] for left, right in pairwise(seen))


def test_what_is_finished_is_not_done_again(bundle: Bundle, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = score_files(bundle, [str(rows)], out, resume=True)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert score_files(bundle, [str(rows)], out, resume=True) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(InputError, match=r"out exists already; remove it or choose another folder"):
        score_files(bundle, [str(rows)], out)
    with pytest.raises(InputError, match=r"out is of another scoring: choose another --out"):
        score_files(bundle, [str(rows)], out, columns=("user",), resume=True)


def test_another_plan_is_not_gone_on_with(
    bundle: Bundle, make: Callable[..., Bundle], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(bundle, rows, out, monkeypatch)
    before = hash_tree(work_of(out) / "parts")
    with pytest.raises(InputError, match="is of another scoring, with another model: choose another --out"):
        score_files(make("other", 2), [str(rows)], out, resume=True)
    with pytest.raises(InputError, match="is of another scoring, with another columns: choose another --out"):
        score_files(bundle, [str(rows)], out, columns=("user",), resume=True)
    shutil.copy(rows, tmp_path / "more.csv")
    with pytest.raises(InputError, match="is of another scoring, with another inputs: choose another --out"):
        score_files(bundle, [str(rows), str(tmp_path / "more.csv")], out, resume=True)
    text = rows.read_text()
    rows.write_text(text.replace("ann", "bob", 1))  # as many bytes
    with pytest.raises(InputError, match=r"input .*rows.csv has changed since the scoring began: score it anew"):
        score_files(bundle, [str(rows)], out, resume=True)
    assert hash_tree(work_of(out) / "parts") == before


def test_a_file_that_changes_meanwhile_is_told(bundle: Bundle, rows: Path, tmp_path: Path) -> None:
    def touch(stage: str, done: int, total: int) -> None:
        if done == total:
            rows.write_text(rows.read_text().replace("ann", "bob", 1))

    with pytest.raises(InputError, match=r"input .*rows.csv was changed while it was scored: score it anew"):
        score_files(bundle, [str(rows)], tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


def test_two_do_not_write_the_same_folder(bundle: Bundle, rows: Path, tmp_path: Path) -> None:
    work = work_of(tmp_path / "out")
    work.mkdir()
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is in use by another masknet score"):
            score_files(bundle, [str(rows)], tmp_path / "out", resume=True)
    assert score_files(bundle, [str(rows)], tmp_path / "out", resume=True).bad_rows == 0


def test_who_has_waited_for_the_one_that_finished_is_told_at_once(
    bundle: Bundle, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look at the output and the lock another process ends: nothing is scored, and nothing left."""
    out, seen = tmp_path / "out", list[int]()

    @contextmanager
    def late(work: Path, command: str) -> Iterator[None]:
        monkeypatch.setattr(files, "alone", alone)
        score_files(bundle, [str(rows)], out)
        with alone(work, command):
            yield

    monkeypatch.setattr(files, "alone", late)
    with pytest.raises(InputError, match=r"out exists already; remove it or choose another folder"):
        score_files(
            bundle, [str(rows)], out, progress=lambda stage, done, total: seen.append(done) if out.exists() else None
        )
    assert seen == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "rows.csv"]
    assert (out / files.DONE).exists()


def test_threads_give_the_bits_of_one(bundle: Bundle, rows: Path, tmp_path: Path) -> None:
    score_files(bundle, [str(rows)], tmp_path / "many")
    score_files(bundle, [str(rows)], tmp_path / "one", engine=LocalEngine(1))  # as processes elsewhere: chunk by chunk
    assert hash_tree(tmp_path / "one") == hash_tree(tmp_path / "many")
