"""The baselines where negatives are dropped, and where there are more rows than they are fitted on."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

from features.dataset import LABEL, PreparedDataset
from features.metrics import calibration
from features.prepare import prepare
from features.schema import Schema
from features.splits import SplitRule
from training import baselines
from training.baselines import baseline_scores, corrected, sample_notes

RATE = 0.2


def prepared(home: Path, frame: pd.DataFrame, name: str, **sampling: object) -> PreparedDataset:
    frame.to_parquet(home / f"{name}.parquet")
    fields = [{"name": "a", "type": "categorical"}]
    schema = Schema.model_validate({"name": name, "label": {"column": "click"}, "fields": fields, **sampling})
    split = SplitRule.parse("random:0.6,0.2,0.2")
    prepare(schema, {"input": [str(home / f"{name}.parquet")]}, home / name, split=split)
    return PreparedDataset.open(home / name)


@pytest.fixture(scope="module")
def clicks() -> pd.DataFrame:
    random = np.random.default_rng(0)
    a_N = random.integers(0, 5, 20_000)
    return pd.DataFrame({"a": a_N, "click": (random.random(20_000) < 0.05 * (1 + a_N)).astype(int)})


def test_probabilities_are_corrected_for_the_negatives_that_preparing_drops(
    clicks: pd.DataFrame, tmp_path: Path
) -> None:
    data = prepared(tmp_path, clicks, "dropped", negative_sampling={"rate": RATE})
    train, test = (data.split(name)[LABEL].to_numpy() for name in ("train", "test"))
    assert train.mean() > 2 * test.mean()
    for name, score_N in baseline_scores(data, "test").items():
        assert calibration(test, score_N) == pytest.approx(1, abs=0.15), name  # three standard deviations by chance
    odds = int(train.sum()) / int((train == 0).sum()) * RATE
    assert baseline_scores(data, "test")["base rate"][0] == pytest.approx(odds / (1 + odds), rel=1e-12)


def test_probabilities_are_for_all_rows_where_negatives_never_arrived(clicks: pd.DataFrame, tmp_path: Path) -> None:
    kept_N = (clicks["click"] > 0) | (np.random.default_rng(1).random(len(clicks)) < RATE)
    data = prepared(tmp_path, clicks[kept_N].reset_index(drop=True), "arrived", already_sampled={"rate": RATE})
    true_rate = clicks["click"].mean()
    found, ids_N = baseline_scores(data, "test"), data.split("test")["a"].to_numpy()
    assert found["base rate"][0] == pytest.approx(true_rate, rel=0.06)
    low, high = (found["logistic regression"][ids_N == one].mean() for one in extremes(data))
    assert (low, high) == (pytest.approx(0.05, abs=0.015), pytest.approx(0.25, abs=0.03))


def extremes(data: PreparedDataset) -> tuple[int, int]:
    """The ids of the fields' values with the fewest and the most clicks."""
    return tuple(int(data.pipeline.encode({"a": [value]})["a"][0].as_py()) for value in ("0", "4"))  # type: ignore[return-value]


def test_correction_by_hand() -> None:
    np.testing.assert_allclose(corrected(np.array([0.0, 0.5, 1.0]), 0.25), [0, 0.2, 1], rtol=0, atol=1e-15)


def test_many_rows_are_fitted_by_a_sample(
    clicks: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepared(tmp_path, clicks, "many")
    whole = baseline_scores(data, "test")
    files = data.files("train")
    assert sample_notes(files) == ()
    sizes: list[int] = []

    class Counting(LogisticRegression):  # type: ignore[misc]
        def fit(self, x: Any, y: Any, sample_weight: Any = None) -> Any:
            sizes.append(x.shape[0])
            return super().fit(x, y, sample_weight)

    monkeypatch.setattr(baselines, "MOST_ROWS", 1500)
    monkeypatch.setattr(baselines, "LogisticRegression", Counting)
    found, again = baseline_scores(data, "test"), baseline_scores(data, "test")
    assert set(sizes) == {1500}
    for name, score_N in found.items():
        np.testing.assert_array_equal(score_N, again[name])
    np.testing.assert_array_equal(found["base rate"], whole["base rate"])
    assert 0 < np.abs(found["logistic regression"] - whole["logistic regression"]).max() < 0.08
    assert sample_notes(files) == (
        f"Logistic regression is fitted on 1,500 of {files.num_rows:,} training rows, drawn at random.",
    )
