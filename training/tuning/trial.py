"""One trial: a training without its ceremony, that asks after every epoch whether it is worth going on.

TRIAL/
  checkpoints/    while it runs; the same command goes on from them
  epoch.json      the newest epoch and its metric, for whoever decides
  answer.json     the decision on it
  result.json     when it is over, however it ended
"""

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.files import file_written_whole, read_json, write_json
from training.config import Config
from training.fit.observer import Observer
from training.workers import DONE, Result, outcome

PRUNED, REFUSED = "pruned", "refused"  # beside what `training.workers` knows
_PATIENCE = 0.02  # seconds between two looks for an answer


@dataclass(frozen=True)
class Trial:
    """A configuration to try; train.early_stop.metric is what it is judged by, on the validation split."""

    number: int
    config: Config
    data: Path
    folder: Path


class Questions:
    """Between a trial's process, which asks, and the one that knows all trials and answers: two files."""

    def __init__(self, folder: Path) -> None:
        self._question, self._answer = folder / "epoch.json", folder / "answer.json"

    def ask(self, epoch: int, value: float) -> bool:
        """Whether to stop after an epoch, counted from 1; waits for the answer."""
        with file_written_whole(self._question) as aside:
            write_json(aside, {"epoch": epoch, "value": value if math.isfinite(value) else None})
        while (answer := _read(self._answer)) is None or answer["epoch"] != epoch:
            time.sleep(_PATIENCE)
        return bool(answer["stop"])

    def pending(self) -> tuple[int, float | None] | None:
        """The newest question, an epoch and its value, unless it is answered; None stands for what is no number."""
        question, answer = _read(self._question), _read(self._answer)
        if question is None or (answer is not None and answer["epoch"] == question["epoch"]):
            return None
        return question["epoch"], question["value"]

    def answer(self, epoch: int, stop: bool) -> None:
        """Let the trial go on, or stop."""
        with file_written_whole(self._answer) as aside:
            write_json(aside, {"epoch": epoch, "stop": stop})

    def forget(self) -> None:
        """Begin anew."""
        self._question.unlink(missing_ok=True)
        self._answer.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return found


class _Pruned(Exception):
    """Others were better by now."""


class _Asking(Observer):
    def __init__(self, questions: Questions, metric: str) -> None:
        self._questions, self._metric = questions, metric

    def epoch_done(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        if self._questions.ask(epoch + 1, metrics[self._metric]):
            raise _Pruned(f"after epoch {epoch + 1}: {self._metric} {metrics[self._metric]:.4f}, worse than the median")


def run_trial(trial: Trial) -> Result:
    """Train and tell how it went; never raises for what goes wrong in it. What an earlier call has ended stays."""
    path = trial.folder / "result.json"
    if path.is_file():
        return dict(read_json(path, "tuning"))
    started = time.perf_counter()
    result = outcome(lambda: _train(trial))
    result["seconds"] = time.perf_counter() - started
    with file_written_whole(path) as aside:
        write_json(aside, result)
    shutil.rmtree(trial.folder / "checkpoints", ignore_errors=True)
    return result


def _train(trial: Trial) -> Result:
    from features.dataset import PreparedDataset
    from training.distributed import join_world
    from training.fit.dataset import Going, fit_dataset

    questions = Questions(trial.folder)
    questions.forget()
    observer = _Asking(questions, trial.config.train.early_stop.metric)
    going = Going(
        checkpoints=trial.folder / "checkpoints", failed=trial.folder / "failed", observer=observer, resume=True
    )
    try:
        with join_world() as world:
            position = fit_dataset(trial.config, PreparedDataset.open(trial.data), world, going).position
    except _Pruned as pruned:
        return {"status": PRUNED, "reason": str(pruned)}
    best = position.history[position.best_epoch]
    return {"status": DONE, "value": best[trial.config.train.early_stop.metric], **position.summary()}
