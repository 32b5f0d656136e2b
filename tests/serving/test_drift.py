"""The bundle's reference against counts by hand, and drift of logs and raw rows against it."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.dataset import PreparedDataset
from features.encoders import AnyEncoder, DatePart, Identity, Vocabulary
from features.errors import InputError
from features.metrics import psi
from features.pipeline import FeaturePipeline
from features.schema import Schema
from masknet.model import MaskNet
from serving.bundle import Bundle, fields_of, load_bundle, tables_of, write_bundle
from serving.members import Member
from serving.monitoring.drift import Drifted, DriftResult, measure_drift
from serving.monitoring.reference import FieldReference, Reference, ScoreReference, load_reference
from tests.serving.conftest import CONFIG
from training.drift_page import render

Make = Callable[..., Bundle]
USERS, ITEMS = 5, 4
HALF = ScoreReference(rows_of="valid split", starts=(0.5,), counts=(500, 500))


def reference(*names: str) -> Reference:
    """All users and items, as often as each other; hours likewise."""
    users = FieldReference(bins=(2, 3), counts=(0, 100, 450, 450, 0))
    items = FieldReference(bins=(2, 3, 4, 5), counts=(10, 0, 250, 250, 250, 240, 0))
    hours = FieldReference(bins=tuple(range(2, 22)), counts=(0, 0, *[40] * 20, 160))
    known = {"user": users, "item": items, "hour": hours}
    return Reference(fields={name: known[name] for name in names or ("user", "item")}, score=HALF)


def rows(count: int, seed: int = 0, **changed: Any) -> pa.Table:
    """A log of requests of 10 rows each: users and items as in the reference."""
    random = np.random.default_rng(seed)
    request_N = np.arange(count) // 10
    user_Q = random.choice(["ann", "bob", "new"], count // 10, p=[0.45, 0.45, 0.1])
    columns = {
        "request_id": [f"r{number}" for number in request_N],
        "time": pa.array([datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=int(n)) for n in request_N]),
        "version": ["7"] * count,
        "role": ["champion"] * count,
        "score": random.random(count).astype(np.float32),
        "user": user_Q[request_N],
        "item": random.integers(0, ITEMS, count),
    }
    return pa.table({**columns, **changed})


@pytest.fixture
def measured(make: Make, tmp_path: Path) -> Callable[..., DriftResult]:
    bundle = make("watched", reference=lambda scorer: reference())

    def measure(*tables: pa.Table, version: str = "7", threshold: float = 0.2) -> DriftResult:
        folder = tmp_path / f"log-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for number, table in enumerate(tables):
            pq.write_table(table, folder / f"{number}.parquet")
        return measure_drift(bundle, version, [str(folder)], threshold)

    return measure


def of(result: DriftResult, name: str) -> Drifted:
    return next(one for one in result.fields if one.name == name)


def test_the_reference_counts_the_training_rows(bundle: Bundle, dataset: PreparedDataset) -> None:
    found = load_reference(bundle.path, bundle.pipeline)
    train, valid = dataset.split("train"), dataset.split("valid")
    assert tuple(found.fields) == bundle.pipeline.names
    for name, field in found.fields.items():
        ids = pl.Series(pl.from_arrow(train.select([name]))[name])  # type: ignore[index]
        ids = ids.explode() if ids.dtype == pl.List else ids
        counts = dict(ids.value_counts().iter_rows())
        top = sorted((id_ for id_ in counts if id_ >= 2), key=lambda id_: (-counts[id_], id_))[:20]
        if name != "title":  # thousands of hashes share bins
            assert set(field.bins) >= set(top), name
            by_hand = [counts.get(id_, 0) for id_ in (0, 1, *field.bins)]
            assert list(field.counts) == [*by_hand, len(ids) - sum(by_hand)], name
        assert sum(field.counts) == len(ids), name
    score_N = bundle.scorer.score_encoded(valid)
    starts = np.array(found.score.starts)
    assert found.score.rows_of == "valid split"
    assert list(found.score.counts) == [np.sum(np.digitize(score_N, starts) == k) for k in range(len(starts) + 1)]
    assert max(found.score.counts) <= len(score_N) / 20 + 2


def test_a_bundle_without_reference_loads_and_cannot_tell(make: Make, tmp_path: Path) -> None:
    bundle = make()
    with pytest.raises(InputError, match=r"bundle .* has no reference\.json to tell drift from: train the model anew"):
        measure_drift(bundle, "7", [str(tmp_path)], 0.2)
    watched = make("watched", reference=lambda scorer: reference())
    assert "reference.json" in watched.manifest["files"]
    changed = watched.path / "reference.json"
    changed.write_text(changed.read_text().replace("450", "451"))
    with pytest.raises(InputError, match=r"the SHA-256 of reference\.json is not the one"):
        load_bundle(watched.path)


def test_rows_like_those_of_training_have_not_drifted(measured: Callable[..., DriftResult]) -> None:
    result = measured(rows(2000), rows(3000, 1))
    assert result.rows == 5000
    assert result.drifted == ()
    assert result.versions == {"7": 5000}
    assert result.scores_of == "as served"
    assert result.times == (1767225600.0, 1767225600.0 + 299)
    item = of(result, "item")
    table = pa.concat_tables([rows(2000), rows(3000, 1)])
    counts = [0, 0, *(table["item"].to_numpy() == n for n in range(4)), 0]
    by_hand = np.array([np.sum(part) for part in counts])
    assert item.found_G.tolist() == by_hand.tolist()
    assert item.shift.psi == pytest.approx(psi(np.array(item.expected_G), by_hand), rel=0.05)


def test_five_hundred_rows_raise_no_alarm(measured: Callable[..., DriftResult]) -> None:
    for seed in range(20):
        assert measured(rows(500, seed)).drifted == ()


def test_what_has_changed_is_named(measured: Callable[..., DriftResult]) -> None:
    table = rows(2000)
    missing = pa.array([None if n % 2 else item for n, item in enumerate(table["item"].to_pylist())])
    moved = table.set_column(table.column_names.index("item"), "item", missing)
    result = measured(moved)
    assert result.drifted == ("item",)
    assert of(result, "item").shares_2G[:, 0].tolist() == [0.01, 0.5]
    high = table.set_column(table.column_names.index("score"), "score", pa.array([0.9] * 2000, pa.float32()))
    assert measured(high).drifted == ("score",)
    assert measured(high, threshold=50.0).drifted == ()
    new_users = table.set_column(
        table.column_names.index("user"), "user", pa.array([f"u{n // 10}" for n in range(2000)])
    )
    result = measured(new_users)
    assert result.drifted == ("user",)
    assert of(result, "user").shares_2G[:, 1].tolist() == [0.1, 1.0]


def test_other_versions_scores_and_shadows_do_not_count(measured: Callable[..., DriftResult]) -> None:
    """Fields count whoever answered; scores are this version's; a shadow's rows stand in the log twice."""
    other = rows(1000, 1, version=["6"] * 1000, score=np.full(1000, 0.99, np.float32))
    shadow = rows(1000, 1, version=["8"] * 1000, role=["shadow"] * 1000, score=np.full(1000, 0.99, np.float32))
    result = measured(rows(1000), other, shadow)
    assert result.rows == 2000
    assert result.score.found_G.sum() == 1000
    assert result.drifted == ()
    assert result.versions == {"7": 1000, "6": 1000, "8": 1000}
    eight = measured(rows(1000), other, shadow, version="8")
    assert eight.score.found_G.tolist() == [0, 1000]
    assert eight.drifted == ("score",)


def test_raw_rows_are_scored_by_the_model(measured: Callable[..., DriftResult], make: Make) -> None:
    raw = rows(400).select(["user", "item"])
    result = measured(raw)
    assert result.scores_of == "by the model"
    assert (result.versions, result.times) == ({}, None)
    score_N = make("again").scorer.score(raw)
    assert result.score.found_G.tolist() == [int((score_N < 0.5).sum()), int((score_N >= 0.5).sum())]


def test_columns_that_are_called_as_the_logs_mean_nothing_in_raw_rows(measured: Callable[..., DriftResult]) -> None:
    raw = rows(400).select(["user", "item"])
    roles = pa.array([None, 1, 2, 3] * 100)
    result = measured(raw.append_column("role", roles).append_column("time", pa.nulls(400, pa.timestamp("us", "UTC"))))
    assert (result.rows, result.times) == (400, None)
    texts = pa.array([None, "admin", "guest", "shadow"] * 100)
    assert measured(raw.append_column("role", texts)).rows == 300


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        (pa.array(["good", "bad"] * 200), "holds string, not scores"),
        (pa.array(["0.5", "0.25"] * 200).dictionary_encode(), "holds dictionary<.*>, not scores"),
        (pa.array([[0.5]] * 400), "holds list<.*>, not scores"),
        (pa.array([True, False] * 200), "holds bool, not scores"),
        (pa.array([0.5, 7.0] * 200), "holds what is no score from 0 to 1"),
        (pa.array([0.5, None] * 200), "holds what is no score from 0 to 1"),
    ],
)
def test_a_column_that_is_called_score_and_holds_none_is_told(
    measured: Callable[..., DriftResult], scores: pa.Array, told: str
) -> None:
    table = rows(400)
    table = table.set_column(table.column_names.index("score"), "score", scores)
    with pytest.raises(InputError, match=rf"input .*0\.parquet: column 'score' stands beside this version's .* {told}"):
        measured(table)
    assert measured(table, version="8").scores_of == "by the model", "of another version's rows it means nothing"


def test_whole_numbers_are_scores_too(measured: Callable[..., DriftResult]) -> None:
    table = rows(400)
    table = table.set_column(table.column_names.index("score"), "score", pa.array([0, 1] * 200, pa.int8()))
    assert measured(table).score.found_G.tolist() == [200, 200]


def test_too_few_and_unreadable_rows_are_refused(measured: Callable[..., DriftResult]) -> None:
    with pytest.raises(InputError, match=r"100 rows of (9|10) users or requests are too few to tell drift from chance"):
        measured(rows(100))
    with pytest.raises(InputError, match=r"input .*0\.parquet: column 'item' is missing"):
        measured(rows(400).drop_columns(["item"]))


def test_hours_are_judged_once_a_day_is_there(make: Make, tmp_path: Path) -> None:
    fields = [
        {"name": "user", "type": "categorical"},
        {"name": "item", "type": "categorical", "encoder": "identity", "buckets": 60},
        {"name": "hour", "type": "date", "from": "shown", "part": "hour"},
    ]
    schema = Schema.model_validate({"name": "s", "label": {"column": "click"}, "context": ["user"], "fields": fields})
    encoders: dict[str, AnyEncoder] = {
        "user": Vocabulary(pa.array(["ann", "bob"])),
        "item": Identity(60),
        "hour": DatePart(24, "hour", "UTC"),
    }
    pipeline = FeaturePipeline.build(schema.fields, encoders)
    model = MaskNet(CONFIG, tables_of(pipeline), fields_of(pipeline))
    bundle = write_bundle(
        tmp_path / "hours",
        name="h",
        config=CONFIG,
        schema=schema,
        pipeline=pipeline,
        members=[Member.of(model, "run")],
        sampling_rate=1.0,
        run_id=None,
        evaluate=lambda scorer: {},
        reference=lambda scorer: reference("user", "item", "hour"),
    )
    begin = datetime(2026, 1, 1, 9, tzinfo=UTC)
    for step, verdict in ((timedelta(seconds=1), "not judged"), (timedelta(seconds=90), "stable")):
        shown = pa.array([begin + n * step for n in range(1000)])
        pq.write_table(rows(1000, shown=shown, request_id=[f"r{n}" for n in range(1000)]), tmp_path / "log.parquet")
        hour = of(measure_drift(bundle, "7", [str(tmp_path / "log.parquet")], 0.2), "hour")
        assert hour.verdict == verdict
    pq.write_table(
        rows(1000, shown=pa.array([begin + (n % 2) * timedelta(days=3) for n in range(1000)])), tmp_path / "log.parquet"
    )
    assert of(measure_drift(bundle, "7", [str(tmp_path / "log.parquet")], 0.2), "hour").verdict == "drifted"


def test_the_page_says_which_rows_were_scored_before(measured: Callable[..., DriftResult], make: Make) -> None:
    result, bundle = measured(rows(400)), make("again")
    for rows_of, fresh in (("valid split", True), ("train split", False)):
        score = HALF.model_copy(update={"rows_of": rows_of})
        page = render(bundle, result, reference().model_copy(update={"score": score}))
        assert f"Before: the {rows_of}" in page
        assert ("which the model has not been fitted to" in page) == fresh


def test_reference_is_plain_json(make: Make) -> None:
    bundle = make("watched", reference=lambda scorer: reference())
    data = json.loads((bundle.path / "reference.json").read_text())
    assert data["fields"]["user"] == {"edges": [], "bins": [2, 3], "counts": [0, 100, 450, 450, 0]}
    assert data["score"] == {"rows_of": "valid split", "starts": [0.5], "counts": [500, 500]}
