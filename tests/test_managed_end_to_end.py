"""Managed ids from raw rows to scores: every day brings items that no day before it has seen."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from rich.console import Console

from features.dataset import PreparedDataset
from features.metrics import auc
from features.prepare import prepare
from features.schema import Schema
from features.splits import SplitRule
from serving.bundle import load_bundle
from training.baselines import baseline_scores
from training.config import Config
from training.distributed import join_world
from training.errors import Stopped
from training.evaluation.evaluate import evaluate, rows_of_dataset
from training.fit.dataset import Going, fit_dataset
from training.fit.starting import Start, Weights
from training.progress import Silent
from training.train import train

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.long
BUCKETS, ITEMS, ROWS, EVERY = 62, 30, 6000, 17
SCHEMA = Schema.model_validate(
    {
        "name": "days",
        "label": {"column": "click"},
        "group": "item",
        "fields": [
            {"name": "item", "type": "categorical", "encoder": "managed", "buckets": BUCKETS},
            {"name": "seen", "type": "list", "separator": " ", "share_with": "item"},
            {"name": "noise", "type": "categorical", "encoder": "hash", "buckets": 3},
        ],
    }
)
CONFIG = {
    "experiment": "days",
    "model": {"embedding_dim": 8, "blocks": 1, "block_width": 16, "head": [8]},
    "optimizer": {"sparse": {"name": "rowwise_adagrad", "lr": 0.1}},
    "train": {"epochs": 3, "batch_size": 200, "managed_steps": 5},
    "tracking": {"registered_model": "days"},
}


def write_day(path: Path, first: int) -> None:
    """Rows of the `ITEMS` items from number `first` on, of which the odd ones are clicked and the even ones are not."""
    random = np.random.default_rng(first)
    item = random.integers(first, first + ITEMS, ROWS)
    chance = np.where(item % 2 == 1, 0.95, 0.05)
    pl.DataFrame(
        {
            "item": [f"item-{i}" for i in item],
            "seen": [f"item-{i}" if draw < 0.5 else "" for i, draw in zip(item, random.random(ROWS), strict=True)],
            "noise": random.integers(0, 3, ROWS).astype(str),
            "click": (random.random(ROWS) < chance).astype(int),
        }
    ).write_parquet(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("days")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
        yield home


def prepared(home: Path, day: int, first: int, **given: Any) -> Path:
    write_day(home / f"day-{day}.parquet", first)
    out = home / f"data-{day}"
    prepare(
        SCHEMA, {"input": [str(home / f"day-{day}.parquet")]}, out, split=SplitRule.parse("random:0.8,0.1,0.1"), **given
    )
    return out


@pytest.fixture(scope="module")
def monday(home: Path) -> Path:
    """A bundle of the first day."""
    result = train(Config.model_validate(CONFIG), prepared(home, 1, 0), home / "monday", Console(stderr=True))
    assert result is not None
    return Path(result["bundle"])


def auc_of(bundle: Path, data: Path) -> float:
    table = PreparedDataset.open(data).split("test")
    found = auc(table["_label"].to_numpy(), load_bundle(bundle).scorer.score_encoded(table))
    assert found is not None
    return found


def test_ids_that_nothing_was_fitted_to_are_told_apart(home: Path, monday: Path) -> None:
    bundle = load_bundle(monday)
    assert len(bundle.scorer.id_maps["item"].ids_K) == ITEMS
    assert auc_of(monday, home / "data-1") > 0.93  # 0.95 is the best possible
    dataset = PreparedDataset.open(home / "data-1")
    alone = baseline_scores(dataset, "test")["logistic regression"]  # of hashes, some of which share a column
    assert (auc(dataset.split("test")["_label"].to_numpy(), alone) or 0.0) > 0.7
    raw = pl.read_parquet(home / "day-1.parquet").head(500).to_arrow()
    encoded = bundle.pipeline.encode(raw)
    np.testing.assert_allclose(bundle.scorer.score(raw), bundle.scorer.score_encoded(encoded), atol=1e-6)
    assert bundle.manifest["metrics"]["test"]["auc"] == pytest.approx(auc_of(monday, home / "data-1"))


def test_the_next_days_items_get_rows_of_the_same_table(home: Path, monday: Path) -> None:
    before = load_bundle(monday)
    data = prepared(home, 2, ITEMS, pipeline=before.pipeline)
    assert auc_of(monday, data) < 0.6  # never seen: all items are one
    for day, known in ((1, True), (2, False)):
        rows = rows_of_dataset(before, PreparedDataset.open(home / f"data-{day}"), "test")
        parts = evaluate(before, rows, {}).by_familiarity
        assert parts["known item"]["rows"] == known * rows.table.num_rows
        assert parts["new item"]["rows"] == (not known) * rows.table.num_rows
    start = Start(before)
    result = train(Config.model_validate(CONFIG), data, home / "tuesday", Console(stderr=True), start)
    assert result is not None
    after = load_bundle(Path(result["bundle"]))
    assert auc_of(after.path, data) > 0.93
    assert auc_of(after.path, home / "data-1") > 0.9  # the table has room for both days
    old, new = before.scorer.id_maps["item"], after.scorer.id_maps["item"]
    assert len(new.ids_K) == 2 * ITEMS == BUCKETS - 2
    assert new.rows(old.ids_K).tolist() == old.rows_K.tolist()
    assert new.step > old.step


def test_tables_that_are_not_trained_give_no_rows(home: Path, monday: Path) -> None:
    before = load_bundle(monday)
    data = prepared(home, 3, 2 * ITEMS, pipeline=before.pipeline)
    config = Config.model_validate({**CONFIG, "train": {"epochs": 1, "batch_size": 200, "managed_steps": 5,
                                                        "train_only_affine": True}})  # fmt: skip
    result = train(config, data, home / "wednesday", Console(stderr=True), Start(before))
    assert result is not None
    after = load_bundle(Path(result["bundle"]))
    assert after.scorer.id_maps["item"].ids_K.tolist() == before.scorer.id_maps["item"].ids_K.tolist()


def stopped_at(calls: set[int]) -> Callable[[], bool]:
    """Asks to stop at these calls, counted from 1."""
    made = iter(range(1, 1_000))
    return lambda: next(made) in calls


def test_a_training_that_is_stopped_between_updates_ends_the_same(home: Path, tmp_path: Path) -> None:
    schema = Schema.model_validate({**SCHEMA.plain(), "fields": [{**SCHEMA.fields[0].plain(), "type": "categorical",
                                                                  "buckets": 12}, *SCHEMA.fields[1:]]})  # fmt: skip
    write_day(tmp_path / "day.parquet", 0)
    source = {"input": [str(tmp_path / "day.parquet")]}
    prepare(schema, source, tmp_path / "data", split=SplitRule.parse("random:0.8,0.1,0.1"))
    data = PreparedDataset.open(tmp_path / "data")
    config = Config.model_validate({**CONFIG, "train": {"epochs": 2, "batch_size": 200, "managed_steps": EVERY}})

    def fitted(folder: str, resume: bool = False, stop_asked: Callable[[], bool] = lambda: False) -> Weights:
        going = Going(
            checkpoints=tmp_path / folder,
            failed=tmp_path / "failed",
            observer=Silent(),
            resume=resume,
            stop_asked=stop_asked,
        )
        with join_world() as world:
            weights = fit_dataset(config, data, world, going).weights
        assert weights is not None
        return weights

    whole = fitted("whole")
    with pytest.raises(Stopped):
        fitted("stopped", stop_asked=stopped_at({1}))
    (saved,) = (int(path.name.removeprefix("step-")) for path in (tmp_path / "stopped").glob("step-*"))
    assert 0 < saved < EVERY  # what is counted by then is in the checkpoint alone
    with pytest.raises(Stopped):
        fitted("stopped", resume=True, stop_asked=stopped_at({2}))
    resumed = fitted("stopped", resume=True)
    assert len(whole.id_maps["item"].ids_K) == 10  # of 30 items: others have lost their rows
    for name in ("ids_K", "rows_K"):
        assert getattr(resumed.id_maps["item"], name).tolist() == getattr(whole.id_maps["item"], name).tolist()
    assert resumed.id_maps["item"].usage["counts"].tolist() == whole.id_maps["item"].usage["counts"].tolist()
    for name, table in whole.tables.items():
        assert (resumed.tables[name] == table).all(), name


def test_two_processes_give_the_same_rows(home: Path, monday: Path) -> None:
    (home / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, "-m", "training", "train", "config.yaml", "--data", str(home / "data-1"), "--out", "two"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [*command, "--nproc", "2", "--json"],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert answer.returncode == 0, answer.stderr
    bundle = Path(json.loads(answer.stdout)["bundle"])
    bundle = bundle if bundle.is_absolute() else home / bundle
    one, two = (load_bundle(path).scorer.id_maps["item"] for path in (monday, bundle))
    assert two.ids_K.tolist() == one.ids_K.tolist()
    assert two.rows_K.tolist() == one.rows_K.tolist()
    assert two.usage["counts"].tolist() == one.usage["counts"].tolist()
