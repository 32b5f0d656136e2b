"""What several seeds' models say of a configuration, and the model that is registered: the best, or all as one."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import t as student

from features.dataset import PreparedDataset
from features.errors import InputError
from serving.bundle import load_bundle
from serving.ensemble import write_ensemble
from serving.scorer import Scorer
from training.backends import checked
from training.calibration import calibrate
from training.config import Config
from training.evaluation.scored import metrics_of
from training.tracking.opening import open_run
from training.train import train
from training.trained_rows import reference_of
from training.tuning.seeds import SeedJob
from training.workers import DONE, Result

LEVEL = 0.05
Metrics = dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Spread:
    """A metric over seeds: its mean and the 95 % interval of that by Student's t, None with a single seed.

    The interval is of what other seeds would change, not of what other rows would.
    """

    mean: float
    low: float | None
    high: float | None
    deviation: float | None
    by_seed: dict[int, float]


@dataclass(frozen=True)
class Trained:
    """A configuration's trainings; `results` by seed, of those that went wrong, too, one at least of which did not."""

    config: Config
    dataset: PreparedDataset
    jobs: list[SeedJob]
    results: dict[int, Result]

    @property
    def done(self) -> dict[int, Result]:
        """The results of the seeds that came to an end."""
        return {seed: result for seed, result in self.results.items() if result["status"] == DONE}

    def validated(self) -> dict[int, float]:
        """The metric that decides, by seed, as training validated its best epoch: as of a trial, before calibration."""
        metric = self.config.train.early_stop.metric
        return {seed: result["history"][result["best_epoch"] - 1][metric] for seed, result in self.done.items()}

    def run_ids(self) -> list[str]:
        """The MLflow runs of the seeds that came to an end."""
        return [str(result["run_id"]) for result in self.done.values()]

    def best(self, console: Console) -> Result:
        """Register the model that is best on validation; returns its seed, run_id, bundle, metrics and model_uri."""
        value, sign = self.validated(), 1 if self.config.train.early_stop.metric == "auc" else -1
        seed = max(value, key=lambda seed: sign * value[seed])
        job = next(job for job in self.jobs if job.seed == seed)
        result = train(job.config, job.data, job.out, console, resume=True)  # which only registers: it is trained
        assert result is not None  # a world of one
        return {"seed": seed} | {key: result[key] for key in ("run_id", "bundle", "metrics", "model_uri")}

    def ensemble(self, console: Console) -> Result:
        """Write the bundle that averages all models, unless it is there, and register it; returns the same as `best`.

        It is calibrated as the configuration says, on the mean.
        """
        out = self.jobs[0].out.with_name(f"ensemble-{'-'.join(map(str, self.done))}")
        data = {"path": str(self.dataset.path), **self.dataset.manifest}
        with open_run(self.config, data, out, resume=True, console=console) as run:
            bundle = out / "bundle"
            if not bundle.exists():
                self._write_ensemble(bundle, run.run_id)
            metrics: Metrics = load_bundle(bundle).manifest["metrics"]
            for split, found in metrics.items():
                run.metrics(0, {f"{split}_{name}": value for name, value in found.items()})
            run.tags({"masknet.members": ", ".join(self.run_ids())})
            where = {"run_id": run.run_id, "bundle": str(bundle), "model_uri": run.register(bundle)}
        return {"members": list(self.done), "metrics": metrics, **where}

    def _write_ensemble(self, out: Path, run_id: str) -> None:
        splits = {split: self.dataset.split(split) for split in ("valid", "test")}

        def metrics(scorer: Scorer) -> Metrics:
            return {split: metrics_of(scorer, table) for split, table in splits.items()}

        write_ensemble(
            out,
            [load_bundle(Path(result["bundle"])) for result in self.done.values()],
            name=self.config.tracking.registered_model,
            run_id=run_id,
            evaluate=metrics,
            calibrate=lambda scorer: calibrate(self.config.calibration.method, scorer, self.dataset),
            reference=lambda scorer: reference_of(scorer, [self.dataset]),
            check=lambda scorer: checked(self.config.serving, scorer, self.dataset),
        )


def require_ensemble_possible(dataset: PreparedDataset, seeds: int) -> None:
    """InputError for what would otherwise be noticed after all trainings."""
    if seeds < 2:
        raise InputError("--ensemble averages several models: give --seeds 2 or more")
    if dataset.pipeline.managed:
        field = next(iter(dataset.pipeline.managed))
        raise InputError(
            f"--ensemble: each training gives the managed ids of {field} other rows; one bundle has one map"
        )


def spreads(results: dict[int, Result]) -> dict[str, dict[str, Spread]]:
    """By split and metric; without what is not defined for a seed."""
    metrics: dict[int, Metrics] = {seed: result["metrics"] for seed, result in results.items()}
    first = next(iter(metrics.values()))
    found: dict[str, dict[str, Spread]] = {split: {} for split in first}
    for split, names in first.items():
        for name in names:
            by_seed = {seed: of[split][name] for seed, of in metrics.items()}
            known = {seed: value for seed, value in by_seed.items() if value is not None}
            if len(known) == len(by_seed):
                found[split][name] = spread(known)
    return found


def spread(by_seed: dict[int, float]) -> Spread:
    """Mean and interval of a metric's values."""
    values, mean = np.array(list(by_seed.values())), float(np.mean(list(by_seed.values())))
    if len(values) == 1:
        return Spread(mean, None, None, None, by_seed)
    deviation = float(values.std(ddof=1))
    half = float(student.ppf(1 - LEVEL / 2, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Spread(mean, mean - half, mean + half, deviation, by_seed)


def compared(metric: str, found: Spread, first: float | None, changed: dict[str, dict[str, Any]]) -> str:
    """Whether the best configuration is better than the one given, or than the nearest in the space, in words.

    A trial that is best of many owes some of that to luck. So what is compared are the means over seeds that were not
    searched with, and the single first trial, which nobody has selected: the 95 % interval is the one in which a
    further seed would lie. Both are before calibration, which is fitted on the same rows.
    """
    which = f"nearest to the configuration ({told_changes(changed)})" if changed else "as configured"
    if first is None:
        return f"the one trial {which} has no value to compare with"
    seeds = len(found.by_seed)
    told = f"validation {metric} {found.mean:.4f} over {seeds} seeds, {first:.4f} in the one trial {which}"
    if found.deviation is None:
        return f"{told}: how much of that is luck, one seed does not tell"
    half = float(student.ppf(1 - LEVEL / 2, seeds - 1)) * found.deviation * math.sqrt(1 + 1 / seeds)
    if abs(found.mean - first) <= half:
        return f"{told}: not told apart"
    return f"{told}: {'better' if (found.mean > first) == (metric == 'auc') else 'worse'}"


def told_changes(changed: dict[str, dict[str, Any]]) -> str:
    """What the first trial has otherwise than the configuration, in words."""
    return ", ".join(f"{key} {values['first']} for {values['configured']}" for key, values in changed.items())
