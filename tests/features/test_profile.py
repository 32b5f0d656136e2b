"""The profile: what is counted, and what it warns of."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from features.dataset import PreparedDataset
from features.engines import LocalEngine
from features.files import hash_tree
from features.metrics import binned_auc, psi
from features.prepare import Prepared, prepare
from features.schema import Schema
from features.splits import SplitRule

ROWS = 3000
RANDOM = np.random.default_rng(7)
LABEL = RANDOM.integers(0, 2, ROWS)
TIME = np.arange(ROWS)
LATE = (TIME >= 0.9 * ROWS).astype(int)


def profiled(
    tmp_path: Path, fields: list[dict[str, Any]], columns: dict[str, Any], rule: str = "time:0.8,0.1,0.1"
) -> Prepared:
    pq.write_table(pa.table({"y": LABEL, "at": TIME, **columns}), tmp_path / "a.parquet")
    schema = Schema.model_validate({"name": "t", "label": {"column": "y"}, "time": "at", "fields": fields})
    return prepare(schema, {"input": [str(tmp_path / "a.parquet")]}, tmp_path / "data", split=SplitRule.parse(rule))


@pytest.mark.parametrize(
    ("field", "values", "told"),
    [
        ({"type": "categorical"}, ["same"] * ROWS, "is constant in train"),
        ({"type": "categorical"}, [None] * ROWS, "has no value at all in train"),
        ({"type": "categorical", "min_count": 1}, [f"row {n}" for n in range(ROWS)], "is it an id of the row?"),
        (
            {"type": "categorical"},
            [f"{n % 3}-{late}" for n, late in zip(TIME, LATE, strict=True)],
            "drifts from train to test",
        ),
        ({"type": "numeric"}, RANDOM.normal(0, 1, ROWS) + 5 * LATE, "drifts from train to test"),
        ({"type": "numeric", "encoder": "standard"}, RANDOM.normal(0, 1, ROWS) + 5 * LATE, "drifts from train to test"),
        ({"type": "categorical"}, [f"{label}" for label in LABEL], "tells the label on its own"),
        ({"type": "numeric", "buckets": 8}, LABEL + RANDOM.normal(0, 0.05, ROWS), "tells the label on its own"),
        ({"type": "numeric", "encoder": "minmax"}, -LABEL + RANDOM.normal(0, 0.05, ROWS), "tells the label on its own"),
        ({"type": "categorical", "encoder": "identity", "buckets": 3}, TIME % 4, "not below its 3 buckets"),
    ],
)
def test_what_is_odd_about_a_field_is_told(tmp_path: Path, field: dict[str, Any], values: Any, told: str) -> None:
    fields = [{"name": "odd", **field}, {"name": "fine", "type": "categorical"}]
    findings = profiled(
        tmp_path, fields, {"odd": values, "fine": [f"{n % 5}" for n in RANDOM.permutation(ROWS)]}
    ).profile["findings"]
    assert [finding for finding in findings if "field 'odd'" in finding and told in finding], findings
    assert not [finding for finding in findings if "'fine'" in finding]


def test_repeated_rows_and_time_travel_are_told(tmp_path: Path) -> None:
    fields = [{"name": "a", "type": "categorical"}]
    values = [f"{n % 10}" for n in range(ROWS)]
    told = profiled(tmp_path, fields, {"a": values}, "random:0.8,0.1,0.1").profile["findings"]
    assert [finding for finding in told if finding.startswith("time travel")]
    assert not [finding for finding in told if "repeat" in finding]  # every row has a time of its own
    pq.write_table(pa.table({"y": LABEL[:300], "a": values[:300]}), tmp_path / "b.parquet")
    schema = Schema.model_validate({"name": "t", "label": {"column": "y"}, "fields": fields})
    again = prepare(
        schema,
        {"input": [str(tmp_path / "b.parquet")]},
        tmp_path / "again",
        split=SplitRule.parse("random:0.8,0.1,0.1"),
    )
    assert again.profile["repeated_rows"] == pytest.approx(1 - 20 / 300)
    assert [finding for finding in again.profile["findings"] if finding.startswith("93.3% of the rows repeat")]


def test_counts_are_those_of_the_data(tmp_path: Path) -> None:
    words = [None if n % 10 == 0 else f"w{n % 4}" if n < 2900 else f"new{n}" for n in range(ROWS)]
    numbers = [None if n % 6 == 0 else float(n % 100) for n in range(ROWS)]
    lists = [["a", "b"], [], ["c"]] * (ROWS // 3)
    fields = [
        {"name": "word", "type": "categorical"},
        {"name": "hashed", "type": "categorical", "encoder": "hash", "buckets": 5},
        {"name": "number", "type": "numeric"},
        {"name": "list", "type": "list"},
    ]
    columns = {"word": words, "hashed": words, "number": numbers, "list": lists}
    facts = profiled(tmp_path, fields, columns).profile["fields"]
    test_words = words[2700:]
    unknown = sum(word is not None and word.startswith("new") for word in test_words)
    assert facts["word"]["test"] | {"top": []} == {
        "values": 300, "missing": 30, "unknown": unknown, "distinct": 4 + unknown, "top": [],
    }  # fmt: skip
    assert facts["hashed"]["test"]["distinct"] == 4 + unknown
    train = [word for word in words[:2400] if word]
    top = sorted(((word, train.count(word)) for word in set(train)), key=lambda pair: (-pair[1], pair[0]))
    assert [tuple(pair) for pair in facts["word"]["train"]["top"]] == top
    assert sorted(tuple(pair) for pair in facts["hashed"]["train"]["top"]) == sorted(top)
    present = np.array([number for number in numbers[:2400] if number is not None])
    assert (
        facts["number"]["train"]["quantiles"] == np.quantile(present, [0, 0.25, 0.5, 0.75, 1], method="lower").tolist()
    )
    assert facts["number"]["train"]["distinct"] == len(set(present.tolist()))
    assert facts["list"]["train"] == {
        "values": 3200,
        "missing": 800,
        "unknown": 0,
        "distinct": 3,
        "top": [["a", 800], ["b", 800], ["c", 800]],
    }


def test_binned_auc_is_scikit_learns() -> None:
    negatives, positives = RANDOM.integers(0, 50, (2, 30))
    scores = RANDOM.integers(0, 12, 30) / 12
    label = np.concatenate([np.zeros(negatives.sum()), np.ones(positives.sum())])
    score = np.concatenate([np.repeat(scores, negatives), np.repeat(scores, positives)])
    assert binned_auc(negatives, positives, scores) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert binned_auc(negatives, np.zeros(30, int), scores) is None


def test_psi_by_hand() -> None:
    p, q = np.array([10.5, 20.5]) / 31, np.array([20.5, 10.5]) / 31
    assert psi(np.array([10, 20]), np.array([20, 10])) == pytest.approx(sum((q - p) * np.log(q / p)))
    assert psi(np.array([3, 7]), np.array([3, 7])) == 0.0


def test_nothing_depends_on_the_number_of_workers_or_on_what_was_prepared_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("features.units.UNIT_BYTES", 1500)
    random = np.random.default_rng(2)
    rows = [f"v{n},{n % 9},{i % 2}" for i, n in enumerate(random.integers(0, 900, 4000))]
    fields = [
        {"name": "a", "type": "categorical", "encoder": "hash", "buckets": 50},
        {"name": "b", "type": "numeric"},
        {"name": "c", "type": "categorical", "encoder": "vocabulary"},
    ]
    schema = Schema.model_validate({"name": "t", "label": {"column": "y"}, "fields": [*fields[:2]]})
    path, out = tmp_path / "a.csv", tmp_path / "data"
    path.write_text("a,b,y\n" + "\n".join(rows) + "\n")
    trees = []
    for workers in (1, 2, 5):
        prepare(
            schema,
            {"input": [str(path)]},
            out,
            split=SplitRule.parse("random:0.8,0.1,0.1"),
            engine=LocalEngine(workers),
        )
        trees.append(hash_tree(out))
        shutil.rmtree(out)
    assert trees[0] == trees[1] == trees[2]
    # the same folder again, for other values: the encoders are the new ones
    path.write_text("c,y\n" + "\n".join(f"w{i % 5},{i % 2}" for i in range(100)) + "\n")
    other = Schema.model_validate({"name": "t", "label": {"column": "y"}, "fields": fields[2:]})
    for value in ("w", "z"):
        path.write_text(path.read_text().replace("w", value))
        prepare(other, {"input": [str(path)]}, out, split=SplitRule.parse("random:0.8,0.1,0.1"))
        assert 1 not in PreparedDataset.open(out).split("train")["c"].to_pylist()
        shutil.rmtree(out)
