"""`masknet tune` as its users meet it: real trainings in worker processes, a kill, a stop, MLflow away."""

import csv
import fcntl
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import pytest
import yaml
from mlflow import MlflowClient

from features.dataset import LABEL, PreparedDataset, groups_of
from features.metrics import score_metrics
from serving.bundle import load_bundle
from serving.monitoring.reference import load_reference
from tests.mlflow_server import Server
from training.config import Config, load_config
from training.tracking.opening import flat
from training.tuning.search import Question, Search, best_of, open_study
from training.tuning.space import Space
from training.tuning.trial import PRUNED
from training.workers import DIVERGED, DONE

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "training" / "configs" / "movielens.yaml"
SMALL = ["model.block_width=16", "model.embedding_dim=8", "train.epochs=4", "train.batch_size=512"]
SPACE = {
    "model.kind": {"choices": ["parallel", "serial"]},
    "model.head": {"choices": [[8], []], "when": {"model.kind": "parallel"}, "otherwise": []},
    "optimizer.dense.lr": {"choices": [1.0e-3, 1.0e-4, 1.0e30]},  # the last cannot be trained with
    "optimizer.sparse.lr": {"low": 1.0e-3, "high": 0.3, "log": True},
}


class Home:
    """A folder in which a study runs, with its own MLflow."""

    def __init__(self, folder: Path, data: Path, uri: str | None = None) -> None:
        self.folder, self.out = folder, folder / "out"
        self.uri = uri or f"sqlite:///{folder}/mlflow.db"
        self._data = data
        (folder / "space.yaml").write_text(yaml.safe_dump(SPACE, sort_keys=False))

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "training", *words],
            cwd=self.folder,
            env={**os.environ, "MLFLOW_TRACKING_URI": self.uri, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def tune(self, *options: str) -> subprocess.Popen[str]:
        sets = [word for key in SMALL for word in ("--set", key)]
        given = ["--data", str(self._data), "--space", "space.yaml", "--out", "out", "--json"]
        return self.start("tune", str(CONFIG), *given, *sets, *options)

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """Those that are over."""
        study = optuna.load_study(study_name="masknet", storage=f"sqlite:///{self.out}/study.db")
        return [trial for trial in study.trials if trial.state.is_finished()]

    def over(self) -> int:
        """How many trials are over; nothing is written, as Optuna would where a study is just being made."""
        try:
            with closing(sqlite3.connect(f"file:{self.out}/study.db?mode=ro", uri=True)) as database:
                found = database.execute("SELECT count(*) FROM trials WHERE state NOT IN ('RUNNING', 'WAITING')")
                return int(found.fetchone()[0])
        except sqlite3.OperationalError:
            return 0


def end(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, told = process.communicate(timeout=900)
    assert process.returncode == 0, told
    answer: dict[str, Any] = json.loads(out)
    return answer


@pytest.fixture(scope="module")
def home(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("tuning"), data)


TUNE = ("--trials", "14", "--jobs", "2", "--seeds", "2", "--ensemble")


@pytest.fixture(scope="module")
def answer(home: Home) -> dict[str, Any]:
    """Of a finished study."""
    return end(home.tune(*TUNE))


def rows_of(home: Home) -> list[dict[str, str]]:
    with (home.out / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_best_trial_is_the_one_of_the_least_validation_loss(home: Home, answer: dict[str, Any]) -> None:
    rows = rows_of(home)
    assert [int(row["trial"]) for row in rows] == list(range(14))
    losses = {int(row["trial"]): float(row["valid_logloss"]) for row in rows if row["status"] == DONE}
    best = answer["best"]
    assert best["trial"] == min(losses, key=lambda number: losses[number])
    assert best["value"] == pytest.approx(min(losses.values()), abs=1e-12)
    assert 0.5 < best["value"] < 0.7
    found = json.loads((home.out / "result.json").read_text())
    assert found["first"] == {"value": pytest.approx(losses[0], abs=1e-12), "changed": {}}
    assert sum(found["trials"].values()) == 14
    assert not list((home.out / "trials").glob("*/checkpoints"))


def test_trials_that_diverge_or_lag_are_rows_that_say_so(home: Home, answer: dict[str, Any]) -> None:
    rows = rows_of(home)
    hopeless = [row for row in rows if float(row["optimizer.dense.lr"]) == 1e30]
    assert hopeless
    assert all(row["status"] == DIVERGED and row["reason"].startswith("the loss is") for row in hopeless)
    lagging = [row for row in rows if row["status"] == PRUNED]
    assert lagging
    assert all(2 <= int(row["epochs"]) <= 4 and "worse than the median" in row["reason"] for row in lagging)


def test_the_configuration_is_one_for_masknet_train(
    home: Home, answer: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    best = load_config(home.out / "best.yaml", [])
    given = load_config(CONFIG, SMALL)
    found, searched = flat(best.model_dump(mode="json")), answer["best"]["params"]
    assert found["model.kind"] == searched["model.kind"]
    assert found["model.head"] == json.loads(searched.get("model.head", "[]"))
    for key in ("optimizer.dense.lr", "optimizer.sparse.lr"):
        assert found[key] == pytest.approx(searched[key], rel=1e-3), "four digits"
    assert best.train == given.train, "seed and all"
    assert best.tracking == given.tracking
    trained = end(Home(tmp_path, data).start("train", f"{home.out}/best.yaml", "--data", str(data), "--json"))
    by_seed = answer["best"]["seeds"]["metrics"]["test"]
    assert best.train.seed == 1
    assert trained["metrics"]["test"]["logloss"] == pytest.approx(by_seed["logloss"]["by_seed"]["1"], rel=1e-9)
    assert trained["metrics"]["test"]["auc"] == pytest.approx(by_seed["auc"]["by_seed"]["1"], rel=1e-9)


def test_the_ensemble_is_the_mean_of_the_seeds(home: Home, answer: dict[str, Any], dataset: PreparedDataset) -> None:
    model, test = answer["best"]["model"], dataset.split("test")
    folder = home.out / f"best-{answer['best']['trial']:04d}"
    assert model["members"] == [1, 2]
    seeds = [load_bundle(folder / f"seed-{seed}" / "bundle").scorer.score_encoded(test) for seed in (1, 2)]
    assert np.abs(seeds[0] - seeds[1]).max() > 1e-3
    ensemble, one = load_bundle(home.folder / model["bundle"]), load_bundle(folder / "seed-1" / "bundle")
    score_N = ensemble.scorer.score_encoded(test)
    np.testing.assert_allclose(score_N, np.mean(seeds, axis=0), atol=1e-6)
    label_N = test[LABEL].to_numpy()
    expected = score_metrics(label_N, score_N, groups_of(test))
    for name in ("auc", "logloss", "ece"):
        assert model["metrics"]["test"][name] == pytest.approx(expected[name], abs=1e-9)
        alone = score_metrics(label_N, seeds[0], groups_of(test))
        assert answer["best"]["seeds"]["metrics"]["test"][name]["by_seed"]["1"] == pytest.approx(alone[name], abs=1e-9)
    found, ones = (load_reference(each.path, each.pipeline) for each in (ensemble, one))
    assert found.fields == ones.fields, "the same training rows"
    valid_N = ensemble.scorer.score_encoded(dataset.split("valid"))
    assert list(found.score.counts) == [np.sum(np.digitize(valid_N, found.score.starts) == k) for k in range(20)]


def test_mlflow_has_the_study_its_trials_and_one_model(home: Home, answer: dict[str, Any]) -> None:
    client = MlflowClient(home.uri)
    run_id = json.loads((home.out / "mlflow.json").read_text())["run_id"]
    parent = client.get_run(run_id)
    assert parent.info.status == "FINISHED"
    stored = {artifact.path for artifact in client.list_artifacts(run_id)}
    assert stored == {"best.yaml", "result.json", "trials.csv"}
    below = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{run_id}'")
    trials = {int(run.data.tags["masknet.trial"]): run for run in below if "masknet.trial" in run.data.tags}
    for row in rows_of(home):
        run = trials.pop(int(row["trial"]))
        assert run.info.status == ("FAILED" if row["status"] == DIVERGED else "FINISHED")
        rate = float(row["optimizer.sparse.lr"])
        assert float(run.data.params["optimizer.sparse.lr"]) == pytest.approx(rate, rel=1e-3)
        if row["status"] == DONE:
            assert run.data.metrics["best_valid_logloss"] == pytest.approx(float(row["valid_logloss"]), abs=1e-12)
        else:
            assert run.data.tags["masknet.reason"] == row["reason"]
    assert not trials
    models = {run.info.run_id for run in below if "masknet.trial" not in run.data.tags}
    assert len(models) == 3, "two seeds and the ensemble"
    (version,) = client.search_model_versions("name = 'movielens-ranker'")
    assert version.run_id == answer["best"]["model"]["run_id"]
    assert client.get_model_version_by_alias("movielens-ranker", "candidate").version == version.version


def test_the_same_command_again_trains_nothing(home: Home, answer: dict[str, Any]) -> None:
    files = {path: path.stat().st_mtime_ns for path in home.out.glob("**/bundle/manifest.json")}
    files |= {path: path.stat().st_mtime_ns for path in home.out.glob("trials/*/result.json")}
    again = end(home.tune(*TUNE))
    assert again == answer
    assert {path: path.stat().st_mtime_ns for path in files} == files
    client = MlflowClient(home.uri)
    assert len(client.search_model_versions("name = 'movielens-ranker'")) == 1
    run_id = json.loads((home.out / "mlflow.json").read_text())["run_id"]
    experiment = client.get_run(run_id).info.experiment_id
    assert len(client.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'")) == 14 + 3


def test_a_killed_and_a_stopped_study_goes_on(data: Path, tmp_path: Path) -> None:
    home = Home(tmp_path, data)
    words = ("--trials", "9", "--jobs", "2", "--seeds", "1")
    process = home.tune(*words)
    before = wait_for(home, process, 2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(children, timeout=30)[1], "workers end with who started them"

    with (home.out / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = home.tune(*words)
        assert "out is in use by another masknet tune" in process.communicate()[1]
        assert process.returncode == 2

    process = home.tune(*words)
    wait_for(home, process, 5)
    process.send_signal(signal.SIGTERM)
    out, told = process.communicate(timeout=120)
    assert (process.returncode, out) == (75, "")
    assert "masknet: stopped; the same command goes on with what is done" in told

    stopped = home.trials()
    answer = end(home.tune(*words))
    after = {trial.number: trial for trial in home.trials()}
    assert sorted(after) == list(range(9))
    for trial in before + stopped:
        same = after[trial.number]
        assert (same.value, same.params, same.datetime_complete) == (trial.value, trial.params, trial.datetime_complete)
    assert answer["best"]["seeds"]["done"] == [1]
    assert answer["best"]["model"]["seed"] == 1
    assert answer["best"]["model"]["model_uri"] == "models:/movielens-ranker/1"
    run_id = json.loads((home.out / "mlflow.json").read_text())["run_id"]
    assert MlflowClient(home.uri).get_run(run_id).info.status == "FINISHED"


def wait_for(home: Home, process: subprocess.Popen[str], number: int) -> list[optuna.trial.FrozenTrial]:
    """Until so many trials are over."""
    for _ in range(3000):
        if home.over() >= number:
            return home.trials()
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    pytest.fail("too few trials after minutes")


def test_a_study_without_mlflow_is_registered_when_it_is_back(data: Path, tmp_path: Path) -> None:
    server = Server(tmp_path)  # not started
    home = Home(tmp_path, data, server.uri)
    words = ("--trials", "2", "--seeds", "2", "--ensemble")
    alone = end(home.tune(*words))
    assert alone["best"]["model"]["model_uri"] is None
    server.start()
    try:
        found = end(home.tune(*words))
        assert found["best"]["model"]["model_uri"] == "models:/movielens-ranker/1"
        assert found["best"]["value"] == alone["best"]["value"]
        client = MlflowClient(server.uri)
        run_id = json.loads((home.out / "mlflow.json").read_text())["run_id"]
        experiment = client.get_run(run_id).info.experiment_id
        below = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'")
        assert sorted(run.data.tags.get("masknet.trial", "model") for run in below) == ["0", "1", *["model"] * 3]
    finally:
        server.kill()


@pytest.fixture
def garbled(data: Path, tmp_path: Path) -> Path:
    """The data set with bytes for a test split that nobody can read."""
    copy = tmp_path / "garbled"
    shutil.copytree(data, copy)
    for path in (copy / "test").iterdir():
        path.write_bytes(b"no rows")
    return copy


def test_the_choice_does_not_look_at_the_test_split(
    config: Config, data: Path, garbled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"optimizer.sparse.lr": SPACE["optimizer.sparse.lr"]}))
    question = Question(
        name="blind",
        space=Space.load(tmp_path / "space.yaml", config, []),
        data=data,
        data_digest="0",
        out=tmp_path / "whole",
        metric="logloss",
        trials=4,
        minutes=None,
        jobs=1,
        seed=1,
    )
    found = []
    for where, path in (("whole", data), ("blind", garbled)):
        (tmp_path / where).mkdir()
        asked = replace(question, data=path, out=tmp_path / where)
        study = open_study(asked)
        Search(asked, study, PreparedDataset.open(path), lambda trial: None).run()
        found.append([(trial.params, trial.value, trial.intermediate_values) for trial in study.trials])
        found.append(best_of(study).number)
    assert found[:2] == found[2:]
    assert len({value for _, value, _ in found[0]}) == 4
