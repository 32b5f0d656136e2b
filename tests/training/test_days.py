"""Training over days: every day is scored by the model of the days before, and trained on once."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from features.dataset import LABEL, PreparedDataset
from features.encoders import UNKNOWN
from features.errors import InputError
from features.metrics import auc, logloss
from features.prepare import prepare
from features.schema import Schema
from features.splits import SplitRule
from serving.bundle import Bundle, load_bundle
from training.config import Config, load_config
from training.distributed import join_world
from training.embeddings.fresh_rows import Fresh
from training.embeddings.managed import ManagedIds
from training.errors import Stopped
from training.fit.average import WeightAverage
from training.fit.dataset import Going, fit_data_of_days
from training.fit.days import open_data
from training.fit.starting import Start, Weights
from training.progress import Silent
from training.train import train

QUIET = Console(quiet=True)
ROWS = 1500


def rows(day: int) -> pd.DataFrame:
    """Clicks whose dependence on a field turns round after the second day."""
    random = np.random.default_rng(day)
    a_N, b_N = random.integers(0, 8, ROWS), random.integers(0, 8, ROWS)
    odd_N = (a_N % 2 == 1) if day < 3 else (a_N % 2 == 0)
    return pd.DataFrame({"a": a_N, "b": b_N, "click": (random.random(ROWS) < np.where(odd_N, 0.8, 0.2)).astype(int)})


def schema(**more: object) -> Schema:
    fields = [{"name": name, "type": "categorical"} for name in "ab"]
    return Schema.model_validate({"name": "days", "label": {"column": "click"}, "fields": fields, **more})


@pytest.fixture(scope="module")
def home(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first data set, and three days in the same encoding."""
    home = tmp_path_factory.mktemp("days")
    rows(0).to_parquet(home / "first.parquet")
    source = {"input": [str(home / "first.parquet")]}
    prepare(schema(), source, home / "first", split=SplitRule.parse("random:0.8,0.1,0.1"))
    pipeline = PreparedDataset.open(home / "first").pipeline
    for day in (1, 2, 3):
        rows(day).to_parquet(home / f"{day}.parquet")
        out = home / "days" / f"dt=2026-01-0{day}"
        prepare(schema(), {"train": [str(home / f"{day}.parquet")]}, out, pipeline=pipeline)
    return home


def day(home: Path, number: int) -> Path:
    return home / "days" / f"dt=2026-01-0{number}"


def small(folder: Path, *overrides: str) -> Config:
    path = folder / "config.yaml"
    path.write_text("experiment: days\ntracking: {registered_model: days}\n")
    shape = ["model.embedding_dim=4", "model.block_width=16", "model.head=[8]", "model.blocks=2"]
    rates = ["optimizer.sparse.lr=0.1", "optimizer.dense.lr=0.01"]
    return load_config(path, [*shape, *rates, "train.batch_size=100", "train.epochs=2", *overrides])


@pytest.fixture(scope="module")
def first(home: Path) -> Bundle:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        result = train(small(home), home / "first", home / "out", QUIET)
    assert result is not None
    return load_bundle(Path(result["bundle"]))


def scored(bundle: Bundle, data: Path) -> tuple[float, float | None]:
    table = PreparedDataset.open(data).split("train")
    score_N, label_N = bundle.scorer.score_encoded(table), table[LABEL].to_numpy()
    return logloss(label_N, score_N), auc(label_N, score_N)


def test_each_day_is_scored_by_the_model_of_the_days_before(
    home: Path, first: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = train(small(tmp_path), home / "days", tmp_path / "all", QUIET, Start(first))
    assert result is not None
    assert [len(result["history"]), result["steps"]] == [3, 3 * ROWS // 100]  # each row once
    # the second day by a training that knows the first one alone
    alone = train(small(tmp_path), day(home, 1), tmp_path / "alone", QUIET, Start(first))
    assert alone is not None
    for number, before in [(1, first), (2, load_bundle(Path(alone["bundle"])))]:
        found = result["history"][number - 1]
        assert (found["logloss"], found["auc"]) == pytest.approx(scored(before, day(home, number)), abs=1e-6)
    losses = [found["logloss"] for found in result["history"]]
    assert losses[0] < 0.56 > losses[1]  # the planted entropy is .50
    assert losses[2] > 0.9  # what was learned is wrong on the third day, before it is trained on
    assert result["metrics"]["progressive"] == result["history"][2]
    assert scored(load_bundle(Path(result["bundle"])), day(home, 3))[0] < losses[2] - 0.2  # and unlearned on it


@pytest.mark.long
def test_averages_are_scored_and_kept(home: Path, first: Bundle, tmp_path: Path) -> None:
    """The second day is scored by what a training on the first one alone ends with."""
    seen: list[Weights] = []

    def fit(name: str, *days: int) -> Weights:
        def evaluate(weights: Weights, number: int) -> dict[str, float | None]:
            seen.append(weights)
            return {}

        config = small(tmp_path, f"train.average.name={name}")
        folder = tmp_path / f"{name}-{len(days)}"
        going = Going(checkpoints=folder, failed=folder, observer=Silent())
        with join_world() as world:
            data = open_data([day(home, number) for number in days])
            weights = fit_data_of_days(config, data, world, going, Start(first), evaluate).weights
        assert weights is not None
        return weights

    ends = {name: fit(name, 1) for name in ("none", "ema")}
    fit("ema", 1, 2)
    start, scored_second = seen[-2:]
    for name, weight in ends["ema"].network.items():
        assert torch.equal(weight, scored_second.network[name])
    for name, table in ends["ema"].tables.items():
        assert torch.equal(table, scored_second.tables[name])
        assert not torch.equal(table, ends["none"].tables[name])
        assert torch.equal(start.tables[name], Start(first).weights.tables[name])


def test_days_that_were_stopped_go_on_in_the_middle_of_a_day(home: Path, first: Bundle, tmp_path: Path) -> None:
    class Stopping(Silent):
        step = 0

        def steps_done(
            self, step: int, losses: list[float], auc: float | None, samples_per_second: float, **numbers: float
        ) -> None:
            self.step = step

    config, days = small(tmp_path), open_data([home / "days"])
    scored_days: list[int] = []

    def evaluate(weights: Weights, number: int) -> dict[str, float | None]:
        scored_days.append(number)
        return {"norm": float(sum(table.square().sum() for table in weights.tables.values()))}

    def run(folder: str, stop_after: int | None = None, *, resume: bool = False) -> dict[str, object]:
        listener = Stopping()
        going = Going(
            checkpoints=tmp_path / folder,
            failed=tmp_path / folder,
            observer=listener,
            resume=resume,
            stop_asked=lambda: stop_after is not None and listener.step >= stop_after,
        )
        with join_world() as world:
            fitted = fit_data_of_days(config, days, world, going, Start(first), evaluate)
        assert fitted.weights is not None
        return {"history": fitted.position.history, "tables": {k: v.tolist() for k, v in fitted.weights.tables.items()}}

    whole = run("whole")
    assert scored_days == [0, 1, 2]
    scored_days.clear()
    with pytest.raises(Stopped):
        run("cut", 20)
    assert run("cut", resume=True) == whole
    assert scored_days == [0, 1, 2]  # no day twice


def test_days_in_another_encoding_or_with_a_validation_split_are_refused(home: Path, tmp_path: Path) -> None:
    rows(9).assign(b=lambda table: table["b"] + 100).to_parquet(tmp_path / "9.parquet")
    source = {"input": [str(tmp_path / "9.parquet")]}
    prepare(schema(), source, tmp_path / "other", split=SplitRule.parse("random:0.8,0.1,0.1"))
    with pytest.raises(InputError, match=f"{tmp_path / 'other'} was encoded by another pipeline than .*dt=2026-01-01"):
        open_data([home / "days", tmp_path / "other"])
    with pytest.raises(InputError, match=f"{home / 'first'} has a validation split: several data sets are days"):
        open_data([home / "days", home / "first"])
    with pytest.raises(InputError, match="does not exist"):
        open_data([tmp_path / "nowhere"])


def test_data_that_keeps_another_share_of_negatives_is_refused(home: Path, first: Bundle, tmp_path: Path) -> None:
    pipeline = PreparedDataset.open(home / "first").pipeline
    sampled = schema(negative_sampling={"rate": 0.25})
    prepare(sampled, {"train": [str(home / "1.parquet")]}, tmp_path / "sampled", pipeline=pipeline)
    with pytest.raises(InputError, match=r"keeps another share of negatives \(0\.25\) than .*dt=2026-01-01 \(1"):
        open_data([home / "days", tmp_path / "sampled"])
    with pytest.raises(InputError, match=r"keeps another share of negatives \(0\.25\) than that of model days \(1"):
        train(small(tmp_path), tmp_path / "sampled", tmp_path / "out", QUIET, Start(first))


def test_days_without_most_negatives_are_scored_as_such(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sampled = schema(negative_sampling={"rate": 0.25})
    pipeline = PreparedDataset.open(home / "first").pipeline
    for number in (1, 2):
        out = tmp_path / "days" / f"dt={number}"
        prepare(sampled, {"train": [str(home / f"{number}.parquet")]}, out, pipeline=pipeline)
    config = small(tmp_path, "optimizer.sparse.lr=0.3", "train.batch_size=50")
    result = train(config, tmp_path / "days", tmp_path / "out", QUIET)
    assert result is not None
    # one row in two is a click, so four in five of those that are left: a corrected score would predict half of them
    assert result["history"][1]["calibration"] == pytest.approx(1.0, abs=0.1)
    both = {"train": [str(home / "1.parquet")], "test": [str(home / "2.parquet")]}
    prepare(sampled, both, tmp_path / "both", pipeline=pipeline)
    trained = load_bundle(Path(result["bundle"]))
    whole = train(config, tmp_path / "both", tmp_path / "whole", QUIET, Start(trained))
    assert whole is not None
    assert whole["history"][0]["calibration"] == pytest.approx(1.0, abs=0.1)  # of all rows, by corrected scores


def test_a_day_of_few_steps_gives_new_ids_rows(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fields = [{"name": "a", "type": "categorical"}]
    fields += [{"name": "b", "type": "categorical", "encoder": "managed", "buckets": 20}]
    updates: list[int] = []
    honest = ManagedIds.update

    def update(managed: ManagedIds, *arguments: Any) -> Fresh:
        updates.append(1)
        return honest(managed, *arguments)

    def renew(average: WeightAverage, fresh: Fresh) -> None:
        honest_renew(average, fresh)
        [shard] = average.state_dict()["model.embeddings.embedding_bags.t001.weight"].local_shards()
        for rows_E, weight_Ed in fresh.values():
            renewed.extend(rows_E.tolist())
            assert torch.equal(shard.tensor[rows_E], weight_Ed)

    renewed: list[int] = []
    honest_renew = WeightAverage.renew
    monkeypatch.setattr(ManagedIds, "update", update)
    monkeypatch.setattr(WeightAverage, "renew", renew)
    managed = Schema.model_validate({"name": "days", "label": {"column": "click"}, "fields": fields})
    prepare(managed, {"train": [str(home / "1.parquet")]}, tmp_path / "day")
    config = small(tmp_path, "train.managed_steps=100", "train.average.name=ema")
    result = train(config, tmp_path / "day", tmp_path / "out", QUIET)
    assert result is not None
    assert result["steps"] == 15
    assert len(updates) == 14  # rows that change hands after the last step would stay as they were drawn
    id_map = load_bundle(Path(result["bundle"])).scorer.id_maps["b"]
    hash_N = np.unique(PreparedDataset.open(tmp_path / "day").split("train")["b"].to_numpy())
    assert len(hash_N) == 8
    assert sorted(id_map.rows(hash_N)) == sorted(set(id_map.rows(hash_N)))  # a row of its own for each
    assert id_map.rows(hash_N).min() > UNKNOWN
    assert sorted(renewed) == sorted(id_map.rows(hash_N))


def test_plateau_goes_by_the_days_log_loss(home: Path, first: Bundle, tmp_path: Path) -> None:
    class Rates(Silent):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def steps_done(
            self, step: int, losses: list[float], auc: float | None, samples_per_second: float, **numbers: float
        ) -> None:
            self.seen.append(numbers["learning_rate"])

    listener, losses = Rates(), [0.5, 0.4, 0.6]  # the third day is worse
    going = Going(checkpoints=tmp_path / "checkpoints", failed=tmp_path / "failed", observer=listener)
    config = small(tmp_path, "schedule={name: plateau, factor: 0.5}", "train.batch_size=500")  # three steps a day
    with join_world() as world:
        fit_data_of_days(
            config,
            open_data([home / "days"]),
            world,
            going,
            Start(first),
            lambda _, number: {"logloss": losses[number]},
        )
    assert listener.seen == pytest.approx([0.01, 0.01, 0.005])
