"""The search of `masknet tune` with trainings that are made up: what is tried, given up, chosen and gone on with."""

import json
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import optuna
import pytest
import yaml

from features.dataset import PreparedDataset
from features.errors import InputError
from training.config import Config
from training.errors import Failure
from training.sections import CalibrationConfig
from training.tuning import search as search_module
from training.tuning.results import trial_rows
from training.tuning.search import Question, Search, best_of, open_study
from training.tuning.space import Space
from training.tuning.tracked import TrackedStudy
from training.tuning.trial import PRUNED, REFUSED, Questions, Trial
from training.workers import DIVERGED, DONE, FAILED, Result

SPACE = {
    "model.dropout": {"low": 0.0, "high": 0.5},
    "model.blocks": {"low": 1, "high": 6},
}


@dataclass
class Threads:
    """In place of worker processes: one job at a time, in a thread."""

    take: Callable[[], Trial | None]
    work: Callable[[Trial], Result]
    lost: Any
    done: Callable[[Trial, Result], None]
    look: Callable[[], None]
    every: float

    def run(self, processes: int) -> None:
        pool = ThreadPoolExecutor(1)
        while (job := self.take()) is not None:
            future: Future[Result] = pool.submit(self.work, job)
            while not wait([future], timeout=0.001).done:
                self.look()
            self.done(job, future.result())
        pool.shutdown()


def loss_of(config: Config) -> float:
    """What is searched for its least: dropout .3 and 4 blocks."""
    return 0.5 + (config.model.dropout - 0.3) ** 2 + 0.01 * (config.model.blocks - 4) ** 2


def made_up(trial: Trial) -> Result:
    value = loss_of(trial.config)
    best = {"valid_logloss": value, "valid_auc": 1 - value, "best_epoch": 1, "seconds": 0.5}
    return {"status": DONE, "value": best[f"valid_{trial.config.train.early_stop.metric}"], **best}


@dataclass
class Studied:
    """Makes studies of one question in a folder of its own."""

    question: Question
    dataset: PreparedDataset

    def run(self, work: Callable[[Trial], Result] = made_up, **changes: Any) -> optuna.Study:
        question = replace(self.question, **changes)
        study = open_study(question)
        Search(question, study, self.dataset, lambda trial: None, work).run()
        return study


@pytest.fixture
def studied(
    config: Config,
    dataset: PreparedDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Studied:
    monkeypatch.setattr(search_module, "Workers", Threads)
    stored: dict[Path, optuna.storages.InMemoryStorage] = {}  # for speed; like files, later calls find it again
    if "folder" not in request.node.name:
        monkeypatch.setattr(
            search_module, "_storage", lambda path: stored.setdefault(path, optuna.storages.InMemoryStorage())
        )
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    question = Question(
        name="made up",
        space=Space.load(tmp_path / "space.yaml", config, []),
        data=dataset.path,
        data_digest="0",
        out=tmp_path / "out",
        metric="logloss",
        trials=15,
        minutes=None,
        jobs=1,
        seed=3,
    )
    question.out.mkdir()
    return Studied(question, dataset)


def test_the_best_trial_has_the_least_loss_and_the_first_is_as_configured(studied: Studied, config: Config) -> None:
    study = studied.run()
    losses = {trial.number: loss_of(studied.question.space.of(trial.params)) for trial in study.trials}
    assert {trial.number: trial.value for trial in study.trials} == losses
    assert len(losses) == 15
    best = best_of(study)
    assert best.number == min(losses, key=lambda number: losses[number])
    assert losses[0] == loss_of(config)
    assert losses[best.number] < losses[0]
    later, earlier = list(losses.values())[10:], list(losses.values())[1:10]
    assert sum(later) / 5 < sum(earlier) / 9, "it learns from the first ten"


def test_auc_is_maximized(studied: Studied, config: Config, tmp_path: Path) -> None:
    train = config.train.model_copy(update={"early_stop": config.train.early_stop.model_copy(update={"metric": "auc"})})
    space = Space.load(tmp_path / "space.yaml", config.model_copy(update={"train": train}), [])
    study = studied.run(metric="auc", space=space, trials=5)
    assert best_of(study).value == max(1 - loss_of(space.of(trial.params)) for trial in study.trials)


def test_what_goes_wrong_is_a_trial_with_a_reason(studied: Studied) -> None:
    def sometimes(trial: Trial) -> Result:
        if trial.number == 1:
            return {"status": DIVERGED, "reason": "the loss is nan at step 3", "seconds": 1.0}
        if trial.number == 2:
            return {"status": FAILED, "reason": "its process died", "seconds": 0.0}
        return made_up(trial)

    study = studied.run(sometimes, trials=5)
    rows = trial_rows(study)
    assert [row["status"] for row in rows] == [DONE, DIVERGED, FAILED, DONE, DONE]
    assert rows[1]["reason"] == "the loss is nan at step 3"
    assert rows[1]["value"] is None
    assert best_of(study).number in (0, 3, 4)


def test_a_study_of_which_nothing_came_is_told(studied: Studied) -> None:
    study = studied.run(lambda trial: {"status": DIVERGED, "reason": "the loss is nan", "seconds": 1.0}, trials=2)
    with pytest.raises(Failure, match="none of 2 trials came to an end; the first: the loss is nan"):
        best_of(study)


def test_a_configuration_that_is_refused_is_recorded_and_not_trained(
    studied: Studied, config: Config, tmp_path: Path
) -> None:
    path = tmp_path / "free.yaml"  # serial with the configured head, which rules forbid
    path.write_text(yaml.safe_dump({"model.kind": {"choices": ["parallel", "serial"]}}))
    trained: list[str] = []

    def work(trial: Trial) -> Result:
        trained.append(trial.config.model.kind)
        return made_up(trial)

    rows = trial_rows(studied.run(work, space=Space.load(path, config, []), trials=8))
    refused = [row for row in rows if row["status"] == REFUSED]
    assert len(rows) == 8
    assert 0 < len(refused) < 8
    assert trained == ["parallel"] * (8 - len(refused))
    assert {row["model.kind"] for row in refused} == {"serial"}
    assert all("head must be [] for kind serial" in row["reason"] for row in refused)


def test_a_trial_worse_than_the_median_is_given_up(studied: Studied) -> None:
    """Five trials have .6, .5, .4 after their epochs; then one has as much at first and more in the second epoch."""
    courses = {5: [0.6, 0.51, 0.3], 6: [0.9, 0.5, 0.3], 7: [math.nan, math.nan, 0.3]}
    ended: dict[int, int] = {}

    def work(trial: Trial) -> Result:
        questions = Questions(trial.folder)
        for epoch, value in enumerate(courses.get(trial.number, [0.6, 0.5, 0.4]), start=1):
            ended[trial.number] = epoch
            if questions.ask(epoch, value):
                return {"status": PRUNED, "reason": f"after epoch {epoch}", "seconds": 1.0}
        return {**made_up(trial), "value": 0.4}

    study = studied.run(work, trials=8)
    assert ended == {**dict.fromkeys(range(5), 3), 5: 2, 6: 3, 7: 2}
    assert [row["status"] for row in trial_rows(study)] == [*[DONE] * 5, PRUNED, DONE, PRUNED]
    assert study.trials[5].intermediate_values == {1: 0.6, 2: 0.51}


def test_a_study_in_parts_tries_what_an_undisturbed_one_does(studied: Studied, tmp_path: Path) -> None:
    whole = studied.run(trials=14)
    (tmp_path / "parts").mkdir()
    for trials in (3, 12, 14):
        parts = studied.run(trials=trials, out=tmp_path / "parts")
    assert [trial.params for trial in parts.trials] == [trial.params for trial in whole.trials]
    calls: list[int] = []
    studied.run(lambda trial: calls.append(trial.number) or made_up(trial), trials=14, out=tmp_path / "parts")
    assert calls == [], "it is done already"
    assert len(studied.run(trials=14, seed=4, out=tmp_path / "parts").trials) == 14


def test_a_trial_that_was_under_way_goes_on(studied: Studied) -> None:
    def dies(trial: Trial) -> Result:
        if trial.number == 2:
            raise KeyboardInterrupt
        return made_up(trial)

    with pytest.raises(KeyboardInterrupt):
        studied.run(dies, trials=4)
    before = {trial.number: trial.params for trial in open_study(studied.question).trials}
    assert sorted(before) == [0, 1, 2]
    order: list[int] = []
    study = studied.run(lambda trial: order.append(trial.number) or made_up(trial), trials=4)
    assert order == [2, 3]
    assert {number: study.trials[number].params for number in before} == before
    assert [trial.value for trial in study.trials] == [
        loss_of(studied.question.space.of(trial.params)) for trial in study.trials
    ]


def test_minutes_are_those_of_all_calls(studied: Studied) -> None:
    def tried(minutes: float) -> int:
        return sum(trial.state.is_finished() for trial in studied.run(trials=3, minutes=minutes).trials)

    study = open_study(studied.question)
    study.set_user_attr("seconds", 600.0)
    assert tried(10.0) == 0
    assert tried(1000.0) == 3
    assert study.user_attrs["seconds"] > 600


def test_a_folder_holds_one_study(studied: Studied, config: Config, tmp_path: Path) -> None:
    studied.run(trials=1)
    with pytest.raises(InputError, match="holds a study with another data;"):
        studied.run(data_digest="1")
    other = config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.25})})
    with pytest.raises(InputError, match="holds a study with another configuration"):
        studied.run(space=Space.load(tmp_path / "space.yaml", other, []))
    other = config.model_copy(update={"calibration": CalibrationConfig(method="platt")})
    with pytest.raises(InputError, match=r"^\S+ holds a study with another configuration; choose another --out[^\n]*$"):
        studied.run(space=Space.load(tmp_path / "space.yaml", other, []))
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"model.blocks": {"low": 1, "high": 7}}))
    with pytest.raises(InputError, match="holds a study with another space"):
        studied.run(space=Space.load(tmp_path / "space.yaml", config, []))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "study.db").write_text("no database, but long enough to be looked at" * 9)
    with pytest.raises(InputError, match=r"study\.db cannot be used: .*file is not a database"):
        studied.run(out=tmp_path / "text")


def test_mlflow_gets_what_it_missed_when_it_is_back(
    studied: Studied, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    question = studied.question
    tracked = TrackedStudy(question.name, config, question.space, question.out, told.append)
    with monkeypatch.context() as away:
        away.setattr(mlflow, "MlflowClient", _away)
        tracked.open()
        study = studied.run(trials=2)
        tracked.copy(study)
        assert tracked.run_id is None
    assert told == ["MLflow takes no records (no route to host): the same command brings them later"]
    tracked.close(study, "FINISHED", [])
    client = mlflow.MlflowClient()
    parent = client.get_run(str(tracked.run_id))
    assert parent.info.status == "FINISHED"
    wanted = f"tags.mlflow.parentRunId = '{tracked.run_id}'"
    children = client.search_runs([parent.info.experiment_id], wanted)
    assert {child.data.tags["masknet.trial"] for child in children} == {"0", "1"}
    for child in children:
        trial = study.trials[int(child.data.tags["masknet.trial"])]
        assert child.data.metrics["best_valid_logloss"] == trial.value
        assert child.data.params["model.dropout"] == str(question.space.of(trial.params).model.dropout)
        assert child.data.params["model.block_width"] == "16"
        assert child.info.status == "FINISHED"
    again = TrackedStudy(question.name, config, question.space, question.out, told.append)
    again.open()
    again.copy(study)
    assert again.run_id == tracked.run_id
    assert len(client.search_runs([parent.info.experiment_id], wanted)) == 2
    assert json.loads((question.out / "mlflow.json").read_text())["trials"].keys() == {"0", "1"}


def _away() -> Any:
    raise ConnectionError("no route to host")
