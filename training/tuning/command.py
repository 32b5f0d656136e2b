"""`masknet tune` from its options to its files.

OUT/
  study.db            Optuna's study: every trial, finished or under way
  trials/0017/        a trial's result, and while it runs its checkpoints
  best.yaml           the best configuration, for `masknet train`
  best-0017/          the trainings of that trial's configuration: seed-1/ …, as `masknet train` leaves them, and
                      ensemble-1-2-3/, a training's folder too, of the seeds that are its members
  result.json         the answer
  trials.csv          a row per trial
  mlflow.json         the MLflow runs of what is done
  lock                held while a command works here
"""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import optuna
from rich.console import Console

from features.dataset import PreparedDataset
from features.errors import InputError
from features.files import alone, file_written_whole
from training.ablation.study import digest_of
from training.calibration import require_calibratable
from training.config import NAME, Config, load_config, save_config
from training.errors import Stopped
from training.fit.starting import require_trainable
from training.progress import teller
from training.tuning.progress import TuningProgress
from training.tuning.results import Answer, answer_of, trial_rows, write_answer
from training.tuning.search import TRIAL_SEED, Metric, Question, Search, best_of, open_study
from training.tuning.seeds import seed_jobs, train_seeds
from training.tuning.space import Space
from training.tuning.tracked import TrackedStudy
from training.tuning.trained import Trained, require_ensemble_possible, told_changes

TRIALS = 50  # where neither a number nor a time is given
_FILES = ("best.yaml", "result.json", "trials.csv")


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """What `masknet tune` was asked for; see its --help."""

    config: Path
    data: Path
    out: Path | None = None
    name: str | None = None
    trials: int | None = None
    minutes: float | None = None
    space: Path | None = None
    jobs: int = 1
    seeds: int = 5
    ensemble: bool = False
    metric: str | None = None
    set: list[str] = field(default_factory=list)


def run_tune(options: TuneOptions, console: Console) -> tuple[Answer, list[dict[str, Any]]]:
    """Run or go on with a study, and train its best configuration; returns the answer and the trials' rows.

    Raises:
        InputError: configuration, space, data or options are wrong, or OUT holds another study or is in use.
        Failure: no trial, or no seed of the best one, came to an end.
        Stopped: a signal has asked for it; the same command goes on.
    """
    config = _config(options)
    dataset = PreparedDataset.open(options.data)
    question = _question(options, config, dataset)
    valid = dataset.split("valid")
    require_trainable(config, dataset, valid)
    require_calibratable(config.calibration.method, valid)
    if options.ensemble:
        require_ensemble_possible(dataset, options.seeds)
    if changed := question.space.changed():
        told = f"trial 0 is only the nearest to {options.config} in {question.space.source}: {told_changes(changed)}"
        teller(console)(told)
    with _interruptible(), alone(question.out, "masknet tune"):
        study = open_study(question)
        tracked = TrackedStudy(question.name, config, question.space, question.out, teller(console))
        tracked.open()
        status = "FAILED"
        try:
            answer = _answer(options, config, question, study, dataset, tracked, console)
            rows = trial_rows(study)
            write_answer(answer, rows, question.out)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            tracked.close(study, status, [question.out / name for name in _FILES] if status == "FINISHED" else [])
    return answer, rows


def _config(options: TuneOptions) -> Config:
    """The configuration, whose best epoch is decided on by the metric that decides on the best trial."""
    if options.metric not in (None, *get_args(Metric)):
        raise InputError(f"--metric {options.metric} is none of {', '.join(get_args(Metric))}")
    decides = [] if options.metric is None else [f"train.early_stop.metric={options.metric}"]
    config = load_config(options.config, options.set + decides)
    if config.train.members > 1:
        raise InputError(
            f"train.members {config.train.members}: tune trains single models; set it to 1, use --ensemble"
        )
    return config


def _with_train(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def _question(options: TuneOptions, config: Config, dataset: PreparedDataset) -> Question:
    name = options.name or config.experiment
    if not re.fullmatch(NAME, name):
        raise InputError(f"--name {name!r} may have letters, digits, spaces and . _ - only")
    fixed = [given.partition("=")[0] for given in options.set]
    unlimited = options.trials is None and options.minutes is None
    return Question(
        name=name,
        space=Space.load(options.space, _with_train(config, seed=TRIAL_SEED), fixed),
        data=options.data,
        data_digest=digest_of(dataset),
        out=options.out or Path("runs") / "tuning" / name,
        metric=config.train.early_stop.metric,
        trials=TRIALS if unlimited else options.trials,
        minutes=options.minutes,
        jobs=options.jobs,
        seed=config.train.seed,
    )


def _answer(
    options: TuneOptions,
    config: Config,
    question: Question,
    study: optuna.Study,
    dataset: PreparedDataset,
    tracked: TrackedStudy,
    console: Console,
) -> Answer:
    """Search, train the best, register it."""
    with TuningProgress(console, question.metric, question.trials) as progress:

        def told(trial: optuna.trial.FrozenTrial) -> None:
            progress.trial_done(trial, study)
            tracked.copy(study)

        Search(question, study, dataset, told).run()
        best = best_of(study)
        found = _with_train(question.space.of(best.params), seed=config.train.seed)
        with file_written_whole(question.out / "best.yaml") as aside:
            save_config(found, aside)
        jobs = seed_jobs(found, options.data, question.out / f"best-{best.number:04d}", options.seeds)
        progress.seeds_begin(len(jobs))
        results = train_seeds(jobs, options.jobs, progress.seed_done)
    trained = Trained(found, dataset, jobs, results)
    model = trained.ensemble(console) if options.ensemble else trained.best(console)
    tracked.below(trained.run_ids() + ([model["run_id"]] if options.ensemble else []))
    return answer_of(question, study, best, trained, model) | {"config": str(question.out / "best.yaml")}


@contextmanager
def _interruptible() -> Iterator[None]:
    """For the length of a block SIGTERM is as Ctrl-C, and either ends it in order."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command goes on with what is done") from None
    finally:
        signal.signal(signal.SIGTERM, before)
