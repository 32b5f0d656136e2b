"""Drift against the profile of the same data, and against its definition."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.dataset import PreparedDataset
from features.files import read_json
from features.prepare import prepare
from features.schema import Schema
from features.splits import SplitRule
from serving.bundle import Bundle
from tests.training.untrained import untrained
from training.evaluation import drift as drift_module
from training.evaluation.drift import drift

ROWS = 4000


def psi_by_hand(expected: np.ndarray, found: np.ndarray) -> float:
    p, q = (expected + 0.5) / (expected + 0.5).sum(), (found + 0.5) / (found + 0.5).sum()
    return float(np.sum((q - p) * np.log(q / p)))


def test_fields_drift_as_the_profile_says(bundle: Bundle, dataset: PreparedDataset) -> None:
    table = dataset.split("test")
    found = drift(bundle, table, bundle.scorer.score_encoded(table), dataset.files("train"), "test")
    assert found is not None
    profile = read_json(dataset.path / "profile.json", "profile")["fields"]
    assert found.of == "train → test"
    assert found.fields == pytest.approx({name: about["psi"] for name, about in profile.items()}, rel=1e-9)
    assert max(value for value in found.fields.values() if value is not None) > 0.2


def prepared(path: Path, rate: float = 1.0) -> PreparedDataset:
    """Values and hashes that drift, and a field that knows the label; missing values among them."""
    random = np.random.default_rng(4)
    late_N = np.arange(ROWS) >= 0.9 * ROWS
    click_N = random.integers(0, 2, ROWS)
    empty = random.random(ROWS) < 0.1
    columns: dict[str, Any] = {
        "click": click_N,
        "at": np.arange(ROWS),
        "price": pa.array(random.normal(0, 1, ROWS) + 0.7 * late_N, mask=empty),
        "income": np.exp(random.normal(0, 1, ROWS) - 0.2 * late_N),
        "item": [f"i{number}" for number in random.integers(0, 300, ROWS)],
        "shop": [f"s{number}" for number in random.integers(0, 30, ROWS) + 5 * late_N],
        "hint": [f"{(click + noise) % 2}" for click, noise in zip(click_N, random.random(ROWS) < 0.2, strict=True)],
    }
    pq.write_table(pa.table(columns), path / "rows.parquet")
    fields = [
        {"name": "price", "type": "numeric", "encoder": "standard"},
        {"name": "income", "type": "numeric", "encoder": "log1p"},
        {"name": "item", "type": "categorical", "encoder": "hash", "buckets": 100_000},
        {"name": "shop", "type": "list", "separator": " "},
        {"name": "hint", "type": "categorical"},
    ]
    head = {"name": "s", "label": {"column": "click"}, "time": "at", "negative_sampling": {"rate": rate}}
    schema = Schema.model_validate(head | {"fields": fields})
    prepare(schema, {"input": [str(path / "rows.parquet")]}, path / "data", split=SplitRule.parse("time:0.8,0.1,0.1"))
    return PreparedDataset.open(path / "data")


def test_values_hashes_and_lists_drift_as_the_profile_says(tmp_path: Path) -> None:
    dataset = prepared(tmp_path)
    bundle = untrained(tmp_path / "bundle", dataset.schema, dataset.pipeline)
    table = dataset.split("test")
    found = drift(bundle, table, bundle.scorer.score_encoded(table), dataset.files("train"), "test")
    assert found is not None
    profile = read_json(dataset.path / "profile.json", "profile")["fields"]
    assert found.fields == pytest.approx({name: about["psi"] for name, about in profile.items()}, rel=1e-9)
    values = [found.fields[name] for name in ("price", "shop", "hint")]
    assert values[0] is not None
    assert values[1] is not None
    assert values[2] is not None
    assert min(values[0], values[1]) > 0.2 > 0.05 > values[2]


def test_scores_drift_by_the_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = prepared(tmp_path)
    bundle = untrained(tmp_path / "bundle", dataset.schema, dataset.pipeline)
    train, table = dataset.split("train"), dataset.split("test")
    train_N = bundle.scorer.score_encoded(train)
    assert len(train_N) == 3200
    edges = np.sort(train_N)[160 * np.arange(1, 20) - 1]
    for score_N in (train_N, bundle.scorer.score_encoded(table), np.full(50, 0.999, np.float32)):
        counts = [np.bincount(np.digitize(scores, edges), minlength=20) for scores in (train_N, score_N)]
        found = drift(bundle, table, score_N, dataset.files("train"), "test")
        assert found is not None
        assert found.score == pytest.approx(psi_by_hand(*counts), abs=1e-9)
    same = drift(bundle, train, train_N, dataset.files("train"), "train")
    assert same is not None
    assert same.score == pytest.approx(0.0, abs=1e-12)
    assert same.fields == pytest.approx(dict.fromkeys(dataset.pipeline.names, 0.0), abs=1e-12)
    monkeypatch.setattr(drift_module, "SAMPLE", 500)  # of 3,200 rows: twenty bins of 25 rows each, give or take
    of_sample = drift(bundle, train, train_N, dataset.files("train"), "train")
    assert of_sample is not None
    assert of_sample.score is not None
    assert 0 < of_sample.score < 0.1


def test_dropped_negatives_are_no_drift(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, rate=0.2)
    bundle = untrained(tmp_path / "bundle", dataset.schema, dataset.pipeline)
    table = dataset.split("test")
    found = drift(bundle, table, bundle.scorer.score_encoded(table), dataset.files("train"), "test")
    assert found is not None
    profile = read_json(dataset.path / "profile.json", "profile")["fields"]
    assert profile["hint"]["psi"] > 0.1
    assert found.fields["hint"] is not None
    assert found.fields["hint"] < 0.02


def test_without_the_training_split_nothing_is_said(bundle: Bundle, dataset: PreparedDataset) -> None:
    table = dataset.split("test")
    assert drift(bundle, table, np.full(table.num_rows, 0.5), None, "test") is None
