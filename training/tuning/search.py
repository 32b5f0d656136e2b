"""The search: Optuna says what to try and what to give up, workers try it, and a database remembers all of it.

Workers train and ask; only this process speaks to Optuna, in the order of events. Each trial is drawn with a seed of
its own, so that a study that was interrupted draws what an undisturbed one would.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import optuna
import pyarrow as pa
from optuna.trial import TrialState
from sqlalchemy.engine import URL
from sqlalchemy.exc import DatabaseError

from features.dataset import PreparedDataset
from features.errors import InputError, one_line
from training.errors import Failure
from training.fit.starting import require_trainable
from training.tuning.space import Space
from training.tuning.trial import PRUNED, REFUSED, Questions, Trial, run_trial
from training.workers import DONE, Result, Workers, died

Metric = Literal["logloss", "auc"]
FORMAT = 1
TRIAL_SEED = 0  # of training; not one of the seeds that the best configuration is trained with
LOOK_SECONDS = 0.1  # between two looks for trials that ask
_FACTS = ("status", "reason", "valid_logloss", "valid_auc", "best_epoch", "seconds", "samples_per_second")
_CONFIGURED = {"model", "optimizer", "schedule", "train", "calibration"}  # what the answer depends on
_STATES = {DONE: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, REFUSED: TrialState.PRUNED}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is searched for: the best configuration of `space` by a metric of a data set's validation split.

    Attributes:
        name: the study's.
        space: what is searched, over the configuration of a trial.
        data: the prepared data set.
        data_digest: SHA-256 of what it holds.
        out: folder of the study.
        metric: what decides.
        trials: how many there are in all, those of earlier calls among them; None: no limit.
        minutes: how long trials are begun, in all calls together; None: no limit.
        jobs: trials at a time.
        seed: of what is drawn.
    """

    name: str
    space: Space
    data: Path
    data_digest: str
    out: Path
    metric: Metric
    trials: int | None
    minutes: float | None
    jobs: int
    seed: int


def open_study(question: Question) -> optuna.Study:
    """The study in OUT/study.db, made or gone on with; OUT is there. It begins with the configuration, or the nearest.

    Raises:
        InputError: OUT holds another study, or no database can be there; or the space refuses the configuration.
    """
    first, path = question.space.configured(), question.out / "study.db"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(
            storage=_storage(path),
            study_name="masknet",
            direction="maximize" if question.metric == "auc" else "minimize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2),  # steps are epochs, from 1
            load_if_exists=True,
        )
    except (DatabaseError, RuntimeError) as error:
        raise InputError(f"{path} cannot be used: {one_line(error).partition(' (Background')[0]}") from None
    asked = {
        "format": FORMAT,
        "data": question.data_digest,
        "metric": question.metric,
        "configuration": question.space.base.model_dump(mode="json", include=_CONFIGURED),
        "space": question.space.plain(),  # after the configuration, whose own values are choices of it
    }
    known = study.user_attrs.get("asked")
    if known is None:
        study.enqueue_trial(first, skip_if_exists=True)
        study.set_user_attr("asked", asked)
    elif other := next((key for key in asked if known.get(key) != asked[key]), None):
        raise InputError(f"{question.out} holds a study with another {other}; choose another --out or --name")
    return study


def _storage(path: Path) -> optuna.storages.BaseStorage:
    url = URL.create("sqlite", database=str(path)).render_as_string()
    return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})


@dataclass
class Search:
    """A study under way; `told` is called with every trial that is over, `work` done in a worker process."""

    question: Question
    study: optuna.Study
    dataset: PreparedDataset
    told: Callable[[optuna.trial.FrozenTrial], None]
    work: Callable[[Trial], Result] = run_trial
    _running: dict[int, optuna.Trial] = field(default_factory=dict)

    def run(self) -> None:
        """Try until trials or minutes are over; trials that an earlier call has left go on first."""
        self._valid: pa.Table = self.dataset.split("valid")
        unfinished = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        self._left = [optuna.trial.Trial(self.study, trial._trial_id) for trial in unfinished]
        self._began, self._before = time.monotonic(), float(self.study.user_attrs.get("seconds", 0.0))
        try:
            Workers(self._take, self.work, _lost, self._done, self._answer, LOOK_SECONDS).run(self.question.jobs)
        finally:
            self.study.set_user_attr("seconds", self._seconds())

    def _take(self) -> Trial | None:
        while (trial := self._left.pop(0) if self._left else self._next()) is not None:
            try:
                config = self.question.space.suggest(trial)
                require_trainable(config, self.dataset, self._valid)
            except InputError as error:
                self._tell(trial, {"status": REFUSED, "reason": str(error), "seconds": 0.0})
                continue
            self._running[trial.number] = trial
            folder = self.question.out / "trials" / f"{trial.number:04d}"
            folder.mkdir(parents=True, exist_ok=True)
            return Trial(trial.number, config, self.question.data, folder)
        return None

    def _next(self) -> optuna.Trial | None:
        begun = sum(trial.state != TrialState.WAITING for trial in self.study.get_trials(deepcopy=False))
        if self.question.trials is not None and begun >= self.question.trials:
            return None
        if self.question.minutes is not None and self._seconds() >= 60 * self.question.minutes:
            return None
        seed = int(np.random.SeedSequence((self.question.seed, begun)).generate_state(1)[0])
        self.study.sampler = optuna.samplers.TPESampler(seed=seed)
        return self.study.ask()

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    @property
    def _worst(self) -> float:
        return -math.inf if self.question.metric == "auc" else math.inf

    def _answer(self) -> None:
        """Tell Optuna of the epochs that are done, and the trials whether they go on."""
        for number, trial in self._running.items():
            questions = Questions(self.question.out / "trials" / f"{number:04d}")
            if (pending := questions.pending()) is not None:
                epoch, value = pending
                if epoch not in self.study.get_trials(deepcopy=False)[number].intermediate_values:
                    trial.report(self._worst if value is None else value, epoch)
                questions.answer(epoch, bool(trial.should_prune()))

    def _done(self, job: Trial, result: Result) -> None:
        self._tell(self._running.pop(job.number), result)

    def _tell(self, trial: optuna.Trial, result: Result) -> None:
        trial.set_user_attr("result", {key: result[key] for key in _FACTS if key in result})
        state = _STATES.get(result["status"], TrialState.FAIL)
        told = self.study.tell(trial, result["value"] if state == TrialState.COMPLETE else None, state)
        self.study.set_user_attr("seconds", self._seconds())
        self.told(told)


def _lost(trial: Trial) -> Result:
    return {**died(), "seconds": 0.0}


def facts_of(trial: optuna.trial.FrozenTrial) -> Result:
    """How a trial went, but for its course: status, reason, metrics, seconds; empty before it is over."""
    return dict(trial.user_attrs.get("result", {}))


def best_of(study: optuna.Study) -> optuna.trial.FrozenTrial:
    """The trial with the best value; of equals the first.

    Raises:
        Failure: none came to an end.
    """
    with suppress(ValueError):
        return study.best_trial
    reasons = [facts_of(trial)["reason"] for trial in study.trials if "reason" in facts_of(trial)]
    raise Failure(
        f"none of {len(study.trials)} trials came to an end; the first: {reasons[0] if reasons else 'unknown'}"
    )
