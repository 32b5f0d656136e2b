"""The synthetic log: deterministic, of the shape it says, and with the best metrics it says."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from features import synthetic
from features.errors import InputError
from features.synthetic import blocks, cardinalities, write_criteo


def test_files_depend_on_the_seed_and_a_longer_one_begins_with_the_shorter(tmp_path: Path) -> None:
    for name, rows, seed in (("a", 3000, 1), ("b", 3000, 1), ("c", 70_000, 1), ("d", 3000, 2)):
        write_criteo(tmp_path / name, rows, seed=seed, largest=5000)
    a, b, c, d = ((tmp_path / name).read_bytes() for name in "abcd")
    assert a == b
    assert c.startswith(a)
    assert a != d
    assert c.count(b"\n") == 70_000


def test_columns_are_criteos(tmp_path: Path) -> None:
    write_criteo(tmp_path / "a.tsv", 20_000, largest=1000)
    frame = pl.read_csv(tmp_path / "a.tsv", separator="\t", has_header=False, infer_schema=False)
    assert frame.shape == (20_000, 40)
    assert set(frame["column_0"]) == {"0", "1"}
    for column in frame.columns[1:14]:
        assert frame[column].drop_nulls().str.contains(r"^\d+$").all()
    sizes = cardinalities(1000)
    for index, column in enumerate(frame.columns[14:]):
        assert frame[column].str.contains(r"^[0-9a-f]{8}$").all()
        assert frame[column].n_unique() <= sizes[index]
    assert frame["column_16"].n_unique() > 900  # C3, the largest
    counts = frame["column_16"].value_counts(sort=True)["count"].to_numpy()
    # the first of a Zipf law with exponent 1.1 over 1,000 ranks has 12 % of all, by the integral
    assert 0.10 < counts[0] / 20_000 < 0.14


def test_the_best_metrics_are_those_of_the_planted_logits(tmp_path: Path) -> None:
    best = write_criteo(tmp_path / "a.tsv", 100_000, largest=10_000)
    drawn = list(blocks(100_000, 1, cardinalities(10_000)))
    label = np.concatenate([table["label"].to_numpy() for table, _ in drawn])
    logit = np.concatenate([logits for _, logits in drawn])
    assert best.rows == 100_000
    assert best.positives == label.sum()
    assert best.logloss == pytest.approx(log_loss(label, 1 / (1 + np.exp(-logit))), abs=1e-9)
    assert best.auc is not None
    assert abs(best.auc - roc_auc_score(label, logit)) <= best.auc_error
    assert best.auc_error < 1e-3
    assert 0.7 < best.auc < 0.85
    assert 0.2 < label.mean() < 0.35


def test_interactions_carry_what_single_fields_do_not() -> None:
    """The pairs' products have mean zero for each id alone: only the pair tells them."""
    parts = [
        synthetic._centred(np.arange(1, 5000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15), which)
        for which in range(5)
    ]
    for part in parts:
        assert abs(part.mean()) < 0.05
        assert abs(part.std() - 1) < 0.05


@pytest.mark.parametrize("largest", [10, 10**9])
def test_a_cardinality_out_of_range_is_told(tmp_path: Path, largest: int) -> None:
    with pytest.raises(InputError, match="largest cardinality"):
        write_criteo(tmp_path / "a.tsv", 10, largest=largest)
    assert not list(tmp_path.iterdir())


def test_a_hundred_million_ids_take_no_table(tmp_path: Path) -> None:
    best = write_criteo(tmp_path / "a.tsv", 1000, largest=synthetic.LARGEST)
    assert best.rows == 1000
