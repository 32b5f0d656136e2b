"""Splits and sampling: exact shares, ties, and the same rows however the input is cut into units."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features import units
from features.dataset import SPLITS, PreparedDataset
from features.prepare import prepare
from features.schema import Schema
from features.sketches import KEPT, DistinctSketch, RepeatSketch
from features.splits import Assignment, SplitRule, cut_at, random_keys, ranks_of, sampled, time_keys

SCHEMA = {"name": "t", "label": {"column": "y"}, "time": "at", "fields": [{"name": "a", "type": "categorical"}]}


def assigned(units: list[np.ndarray], shares: tuple[float, float, float]) -> np.ndarray:
    cuts = cut_at(ranks_of(shares, sum(map(len, units))), units.__getitem__, len(units))
    assignment = Assignment(cuts=cuts)
    return np.concatenate([assignment.splits(keys, unit, 0) for unit, keys in enumerate(units)])


@pytest.mark.parametrize("distinct", [1, 3, 50, 10**9])
def test_splits_are_those_of_a_stable_sort(distinct: int) -> None:
    random = np.random.default_rng(distinct)
    times = random.integers(-distinct, distinct, 5000) / 7.0
    units = np.split(time_keys(times), np.sort(random.integers(0, 5000, 6)))
    split_N = assigned(units, (0.7, 0.2, 0.1))
    order = np.argsort(times, kind="stable")
    assert split_N[order].tolist() == [0] * 3500 + [1] * 1000 + [2] * 500


def test_time_keys_are_in_the_order_of_the_times() -> None:
    times = np.array([-np.inf, -1e300, -1.5, -0.0, 0.0, 5e-324, 1.0, 1e9, np.inf])
    keys = time_keys(times)
    assert (np.diff(keys.astype(object)) >= 0).all()
    assert keys[3] == keys[4]


def test_random_keys_depend_on_seed_file_and_line_alone() -> None:
    lines = np.arange(1, 10_001)
    keys = random_keys(1, 0, lines)
    assert (random_keys(1, 0, lines[5000:]) == keys[5000:]).all()
    for other in (random_keys(2, 0, lines), random_keys(1, 1, lines)):
        assert not np.isin(other, keys).any()
    share = (keys < np.uint64(2**62)).mean()
    assert abs(share - 0.25) < 0.02  # a standard deviation is .0043


@pytest.mark.parametrize("shares", [(1.0, 0.0, 0.0), (0.0, 0.5, 0.5), (1 / 3, 1 / 3, 1 / 3)])
def test_shares_at_the_edges(shares: tuple[float, float, float]) -> None:
    counts = np.bincount(assigned([random_keys(1, 0, np.arange(100))], shares), minlength=3)
    ends = [round(sum(shares[: i + 1]) * 100) for i in range(2)]
    assert counts.tolist() == [ends[0], ends[1] - ends[0], 100 - ends[1]]


@pytest.mark.parametrize("rule", ["time:0.6,0.2,0.2", "random:0.6,0.2,0.2"])
def test_rows_keep_their_split_however_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    rows = [f"{n % 7},{n % 2},{(n * 37) % 50}" for n in range(500)]
    path = tmp_path / "a.csv"
    path.write_text("a,y,at\n" + "\n".join(rows) + "\n")
    found = []
    for size in (10**6, 400, 90):
        monkeypatch.setattr(units, "UNIT_BYTES", size)
        prepare(
            Schema.model_validate(SCHEMA), {"input": [str(path)]}, tmp_path / str(size), split=SplitRule.parse(rule)
        )
        dataset = PreparedDataset.open(tmp_path / str(size))
        found.append([dataset.split(name).drop(["_weight", "_group"]).to_pydict() for name in SPLITS])
    assert found[0] == found[1] == found[2]
    assert [len(split["a"]) for split in found[0]] == [300, 100, 100]


def test_sampling_drops_negatives_of_the_training_split_only(tmp_path: Path) -> None:
    table = pa.table({"a": ["x"] * 9000, "y": [0, 0, 1] * 3000, "at": range(9000)})
    pq.write_table(table, tmp_path / "a.parquet")
    schema = Schema.model_validate(SCHEMA | {"negative_sampling": {"rate": 0.2}, "already_sampled": {"rate": 0.5}})
    done = prepare(
        schema, {"input": [str(tmp_path / "a.parquet")]}, tmp_path / "d", split=SplitRule.parse("time:0.8,0.1,0.1")
    )
    assert schema.sampling_rate == pytest.approx(0.1)
    train = done.profile["splits"]["train"]
    assert train["positives"] == 2400
    assert abs((train["rows"] - 2400) / 4800 - 0.2) < 0.03  # a standard deviation is .0058
    assert (done.rows["valid"], done.rows["test"]) == (900, 900)
    kept = PreparedDataset.open(tmp_path / "d").split("train")
    negative_N = kept["_label"].to_numpy() == 0
    assert set(kept["_line"].to_numpy()[negative_N].tolist()) <= set(
        (np.flatnonzero(sampled(0.2, 0, np.arange(1, 9001))) + 1).tolist()
    )


def test_distinct_values_are_counted_exactly_and_then_nearly() -> None:
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, 200_000, dtype=np.uint64)
    for size in (0, 1, KEPT - 1):
        sketch = DistinctSketch()
        for part in np.array_split(np.concatenate([hashes[:size]] * 3), 5):
            sketch.add(part)
        assert sketch.distinct == size
    parts = [DistinctSketch() for _ in range(7)]
    for number, part in enumerate(parts):
        part.add(hashes[number::7])
        part.add(hashes[:1000])
    merged = []
    for order in (range(7), range(6, -1, -1)):
        whole = DistinctSketch()
        for number in order:
            whole.merge(parts[number])
        merged.append(whole.distinct)
    assert merged[0] == merged[1]
    assert abs(merged[0] / 200_000 - 1) < 0.06  # a standard error is 1.6 %


def test_repeated_values_are_counted_exactly_and_then_nearly() -> None:
    random = np.random.default_rng(0)
    few = RepeatSketch()
    few.add(np.array([1, 2, 3, 3, 3, 2], np.uint64))
    assert few.repeated == pytest.approx(0.5)
    hashes = random.integers(0, 2**64, 100_000, dtype=np.uint64)
    many = RepeatSketch()
    for part in np.array_split(random.permutation(np.concatenate([hashes, hashes[:25_000]])), 9):
        many.add(part)
    assert abs(many.repeated - 0.2) < 0.03


def test_a_rate_of_one_keeps_all() -> None:
    assert sampled(1.0, 0, np.arange(5)).all()
