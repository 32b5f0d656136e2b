"""The answer of `masknet tune`: the seed that is chosen, the comparison with the first trial, what is told."""

import fcntl
import io
import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import scipy.stats
import yaml
from rich.console import Console

from features.dataset import PreparedDataset
from features.errors import InputError
from tests.conftest import CONFIG, SMALL
from training.config import Config
from training.sections import CalibrationConfig
from training.tuning import trained as trained_module
from training.tuning.command import TuneOptions, run_tune
from training.tuning.results import answer_of, trial_rows, trials_table, write_answer
from training.tuning.search import Question
from training.tuning.seeds import seed_jobs
from training.tuning.space import Space
from training.tuning.trained import Trained, compared, spread, spreads
from training.workers import DONE, FAILED, Result

# By seed, log loss and AUC after each epoch, the best epoch by log loss, and log loss on validation once calibrated.
COURSES: dict[int, tuple[list[tuple[float, float]], int, float]] = {
    1: ([(0.66, 0.60), (0.61, 0.64), (0.63, 0.70)], 2, 0.58),
    2: ([(0.60, 0.66), (0.64, 0.65)], 1, 0.59),
    3: ([(0.65, 0.61), (0.62, 0.62)], 2, 0.57),  # the best, once calibrated on the same rows
}


def result_of(seed: int) -> Result:
    course, best_epoch, calibrated = COURSES[seed]
    history = [{"logloss": logloss, "auc": auc} for logloss, auc in course]
    metrics = {"valid": {"logloss": calibrated, "auc": 0.9 + seed / 100}, "test": {"logloss": 0.7, "auc": 0.5}}
    found = {"status": DONE, "history": history, "best_epoch": best_epoch, "metrics": metrics}
    return found | {"run_id": f"run-{seed}", "bundle": f"bundle-{seed}", "model_uri": None}


@pytest.fixture
def given(config: Config, dataset: PreparedDataset, tmp_path: Path) -> Trained:
    """Three seeds that came to an end and one that did not."""
    jobs = seed_jobs(config, dataset.path, tmp_path / "best-0001", 4)
    wrong = {"status": FAILED, "reason": "its process died"}
    return Trained(config, dataset, jobs, {seed: result_of(seed) for seed in COURSES} | {4: wrong})


@pytest.mark.parametrize(("metric", "seed"), [("logloss", 2), ("auc", 2)])
def test_the_seed_is_chosen_before_calibration(
    given: Trained, monkeypatch: pytest.MonkeyPatch, metric: str, seed: int
) -> None:
    """By log loss .61, .60, .62 or AUC .64, .66, .62 of the best epochs; seed 3 is best in both once calibrated."""
    early_stop = given.config.train.early_stop.model_copy(update={"metric": metric})
    config = given.config.model_copy(update={"train": given.config.train.model_copy(update={"early_stop": early_stop})})
    chosen = Trained(config, given.dataset, given.jobs, given.results)
    assert chosen.validated() == ({1: 0.61, 2: 0.60, 3: 0.62} if metric == "logloss" else {1: 0.64, 2: 0.66, 3: 0.62})

    def registered(_: Config, __: Path, out: Path, *___: Any, **____: Any) -> Result:
        return result_of(int(out.name.removeprefix("seed-")))

    monkeypatch.setattr(trained_module, "train", registered)
    found = chosen.best(Console(quiet=True))
    assert (found["seed"], found["run_id"]) == (seed, f"run-{seed}")


def question_of(config: Config, dataset: PreparedDataset, out: Path, most: float) -> Question:
    """What searches dropout from 0 to `most`; .5 is configured."""
    (out / "space.yaml").write_text(yaml.safe_dump({"model.dropout": {"low": 0.0, "high": most}}))
    return Question(
        name="answered",
        space=Space.load(out / "space.yaml", config, []),
        data=dataset.path,
        data_digest="0",
        out=out,
        metric="logloss",
        trials=2,
        minutes=None,
        jobs=1,
        seed=1,
    )


def study_of(question: Question) -> optuna.Study:
    """The first trial, of log loss .65, and a better one."""
    study, dropouts = optuna.create_study(), (question.space.configured()["model.dropout"], 0.1)
    study.set_user_attr("seconds", 2.0)
    for dropout, value in zip(dropouts, (0.65, 0.6), strict=True):
        facts = {"status": DONE, "valid_logloss": value, "valid_auc": 1 - value, "best_epoch": 1, "seconds": 1.0}
        distributions = {"model.dropout": optuna.distributions.FloatDistribution(0.0, 1.0)}
        attributes = {"result": facts}
        trial = optuna.trial.create_trial(
            value=value, params={"model.dropout": dropout}, distributions=distributions, user_attrs=attributes
        )
        study.add_trial(trial)
    return study


@pytest.mark.parametrize(
    ("most", "changed", "which", "row"),
    [
        (0.6, {}, "as configured", "configured 0"),
        (
            0.3,
            {"model.dropout": {"configured": 0.5, "first": 0.3}},
            "nearest to the configuration (model.dropout 0.3 for 0.5)",
            "nearest 0",
        ),
    ],
)
def test_a_first_trial_that_is_not_as_configured_is_not_called_so(
    given: Trained, tmp_path: Path, most: float, changed: dict[str, Any], which: str, row: str
) -> None:
    question = question_of(given.config, given.dataset, tmp_path, most)
    study = study_of(question)
    answer = answer_of(question, study, study.trials[1], given, {})
    write_answer(answer, trial_rows(study), tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["first"] == {"value": 0.65, "changed": changed}
    told = f"validation logloss 0.6100 over 3 seeds, 0.6500 in the one trial {which}: "
    assert found["best"]["sentence"] == told + "not told apart", "half the interval is 4.3027 · 0.01 · √(4/3) = 0.0497"
    assert found["best"]["seeds"]["value"]["by_seed"] == {"1": 0.61, "2": 0.60, "3": 0.62}
    config = given.config.model_copy(update={"calibration": CalibrationConfig(method="platt")})
    calibrated = Trained(config, given.dataset, given.jobs, given.results)
    told = answer_of(question, study, study.trials[1], calibrated, {})["best"]["sentence"]
    assert told == found["best"]["sentence"] + " (before calibration)"
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(trials_table(trial_rows(study), answer))
    assert row in console.export_text()


@pytest.mark.parametrize(("most", "told"), [(0.6, ""), (0.3, "trial 0 is only the nearest to ")])
def test_what_the_first_trial_changes_is_told_before_the_search(
    data: Path, tmp_path: Path, most: float, told: str
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"model.dropout": {"low": 0.0, "high": most}}))
    console = Console(width=80, file=io.StringIO(), record=True)
    with (tmp_path / "lock").open("w") as lock:  # so that nothing is searched
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="in use by another masknet tune"):
            run_tune(TuneOptions(config=CONFIG, data=data, out=tmp_path, space=space, set=SMALL), console)
    assert console.export_text() == (told and f"{told}{CONFIG} in space {space}: model.dropout 0.3 for 0.5\n")


def test_members_are_refused_before_the_data_is_looked_at(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^train\.members 2: tune trains single models; set it to 1, use --ensemble$"):
        run_tune(TuneOptions(config=CONFIG, data=tmp_path / "none", set=["train.members=2"]), Console())


def test_the_interval_is_students() -> None:
    value = {1: 0.70, 2: 0.72, 3: 0.71, 4: 0.74, 5: 0.73}
    found = spread(value)
    low, high = scipy.stats.t.interval(0.95, 4, loc=0.72, scale=scipy.stats.sem(list(value.values())))
    assert (found.mean, found.low, found.high) == pytest.approx((0.72, low, high), abs=1e-12)
    assert found.high is not None
    assert found.high - 0.72 == pytest.approx(2.776445 * math.sqrt(0.00025 / 5), rel=1e-6)
    alone = spread({1: 0.7})
    assert (alone.mean, alone.low, alone.high, alone.deviation) == (0.7, None, None, None)


def test_a_metric_that_a_seed_has_not_is_left_out() -> None:
    results: dict[int, Result] = {
        seed: {"metrics": {"valid": {"auc": 0.7, "gauc": gauc}, "test": {"auc": 0.6, "gauc": 0.5}}}
        for seed, gauc in ((1, None), (2, 0.6))
    }
    found = spreads(results)
    assert found["valid"].keys() == {"auc"}
    assert found["test"]["gauc"].by_seed == {1: 0.5, 2: 0.5}


def test_better_is_what_a_further_seed_would_hardly_reach() -> None:
    """scipy's Welch test has no say for a single value; Student's with pooled variance is the same interval."""
    found = spread({1: 0.630, 2: 0.628, 3: 0.626})
    for configured in (0.60, 0.620, 0.624, 0.628, 0.632, 0.636, 0.65):
        p = scipy.stats.ttest_ind([0.630, 0.628, 0.626], [configured], equal_var=True).pvalue
        told = compared("logloss", found, configured, {})
        assert told.startswith(
            f"validation logloss 0.6280 over 3 seeds, {configured:.4f} in the one trial as configured: "
        )
        verdict = told.rpartition(": ")[2]
        assert verdict == ("not told apart" if p > 0.05 else "better" if configured > 0.628 else "worse")
    assert compared("auc", found, 0.5, {}).endswith(": better")
    assert compared("auc", spread({1: 0.6}), 0.5, {}).endswith("one seed does not tell")
    assert "no value" in compared("auc", found, None, {})
