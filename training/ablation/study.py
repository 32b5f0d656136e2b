"""`masknet ablate`: every cell trained alike, on several seeds, at a learning rate searched for it, then compared.

OUT/
  study.json              the question: cells, seeds, data, and the MLflow runs of what is done
  runs/CELL/              a result per learning rate tried and per seed, and the seeds' test scores (.npy)
  rates.json              the learning rate of each cell
  cells.json, cells.csv   the answer
  report.html             the same to look at
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from features.dataset import LABEL, PreparedDataset, groups_of
from features.errors import InputError
from features.files import canonical_json, file_written_whole, read_json, write_json
from features.metrics import auc_standard_error
from training.ablation.cells import Cell, next_rate, rates, with_rate
from training.ablation.jobs import Job, run_jobs
from training.ablation.statistics import CellStatistics, compare
from training.errors import Failure
from training.evaluation.clusters import clusters_of
from training.workers import DONE

TUNING_SEED = 0  # not one of the seeds that are compared
MOST_BEYOND = 2  # further learning rates tried while the best is the lowest or the highest
FORMAT = 1

Result = dict[str, Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is asked. Seeds are 1 to `seeds`; `trials` learning rates are tried for each cell with another seed."""

    name: str
    cells: list[Cell]
    baseline: str
    data: Path
    data_digest: str
    out: Path
    seeds: int
    trials: int
    jobs: int
    given_rates: dict[str, float] | None = None
    landscape: tuple[str, ...] = ()


@dataclass
class Outcome:
    """A cell's runs: its learning rate, what was tried for it, and the results of its seeds."""

    cell: Cell
    rate: float
    tried: dict[float, float | None] = field(default_factory=dict)
    runs: dict[int, Result] = field(default_factory=dict)

    @property
    def done(self) -> dict[int, Result]:
        """The results of the seeds that came to an end."""
        return {seed: run for seed, run in sorted(self.runs.items()) if run["status"] == DONE}

    @property
    def beyond(self) -> float | None:
        """The next rate to try, a factor of 3 further out, while the best one is at an end of those tried."""
        if len(self.tried) < 2 or self.rate not in (min(self.tried), max(self.tried)):
            return None
        return next_rate(self.rate, up=self.rate == max(self.tried))

    @property
    def trouble(self) -> str | None:
        """What a table says of seeds that did not come to an end."""
        bad = [run for run in self.runs.values() if run["status"] != DONE]
        if not bad:
            return None
        return f"{bad[0]['status']} in {len(bad)} of {len(self.runs)} seeds: {bad[0]['reason']}"


def run_study(study: Study, progress: Progress, finished: Callable[[Job, Result], None]) -> list[Outcome]:
    """Search the learning rates, then train every cell on every seed; what an earlier run has done is taken over.

    Args:
        study: what to do.
        progress: told of a stage, jobs done and jobs in all.
        finished: called with every job of a seed and its result.
    """
    outcomes = _search(study, progress)
    with file_written_whole(study.out / "rates.json") as aside:
        write_json(aside, {outcome.cell.name: outcome.rate for outcome in outcomes})
    # The baseline first: without it there is nothing to compare with.
    order = sorted(outcomes, key=lambda outcome: outcome.cell.name != study.baseline)
    jobs = [_job(study, order[0], seed) for seed in range(1, study.seeds + 1)]
    jobs += [_job(study, outcome, seed) for seed in range(1, study.seeds + 1) for outcome in order[1:]]
    by_name = {outcome.cell.name: outcome for outcome in outcomes}
    count = 0

    def done(job: Job, result: Result) -> None:
        nonlocal count
        count += 1
        outcome = by_name[job.cell]
        outcome.runs[job.config.train.seed] = result
        finished(job, result)
        if job.cell == study.baseline and len(outcome.runs) == study.seeds and not outcome.done:
            raise Failure(f"the baseline {study.baseline} has no finished run: {outcome.trouble}")
        progress("seeds", count, len(jobs))

    progress("seeds", 0, len(jobs))
    run_jobs(jobs, study.jobs, done)
    return outcomes


def _search(study: Study, progress: Progress) -> list[Outcome]:
    """A learning rate for each cell: given, or the one of the best validation log loss."""
    given = study.given_rates
    if given is not None:
        missing = [cell.name for cell in study.cells if cell.name not in given]
        if missing:
            raise InputError(f"--rates has no learning rate for the cell {missing[0]}")
        return [Outcome(cell, given[cell.name]) for cell in study.cells]
    if study.trials == 1:
        return [Outcome(cell, cell.config.optimizer.dense.lr) for cell in study.cells]
    outcomes = {cell.name: Outcome(cell, cell.config.optimizer.dense.lr) for cell in study.cells}
    jobs = [_tuning_job(study, cell, rate) for cell in study.cells for rate in rates(cell.config, study.trials)]
    for _ in range(1 + MOST_BEYOND):
        _try_rates(study, jobs, outcomes, progress)
        beyond = {outcome.cell.name: outcome.beyond for outcome in outcomes.values()}
        jobs = [_tuning_job(study, outcomes[name].cell, rate) for name, rate in beyond.items() if rate is not None]
        if not jobs:
            break
    return list(outcomes.values())


def _try_rates(study: Study, jobs: list[Job], outcomes: dict[str, Outcome], progress: Progress) -> None:
    tried = sum(len(outcome.tried) for outcome in outcomes.values())
    total = tried + len(jobs)

    def done(job: Job, result: Result) -> None:
        loss = result["valid_logloss"] if result["status"] == DONE else None
        outcomes[job.cell].tried[job.config.optimizer.dense.lr] = loss
        progress("learning rates", sum(len(outcome.tried) for outcome in outcomes.values()), total)

    progress("learning rates", tried, total)
    run_jobs(jobs, study.jobs, done)
    for outcome in outcomes.values():
        losses = {rate: loss for rate, loss in sorted(outcome.tried.items()) if loss is not None}
        if losses:
            outcome.rate = min(losses, key=lambda rate: losses[rate])


def _tuning_job(study: Study, cell: Cell, rate: float) -> Job:
    config = with_rate(cell.config, rate, TUNING_SEED)
    return Job(cell=cell.name, config=config, data=study.data, result=_path(study, cell, config, f"rate-{rate:g}"))


def _job(study: Study, outcome: Outcome, seed: int) -> Job:
    config = with_rate(outcome.cell.config, outcome.rate, seed)
    result = _path(study, outcome.cell, config, f"seed-{seed}")
    landscape = seed == 1 and outcome.cell.name in study.landscape
    return Job(
        cell=outcome.cell.name,
        config=config,
        data=study.data,
        result=result,
        scores=result.with_suffix(".npy"),
        landscape=landscape,
    )


def _path(study: Study, cell: Cell, config: Any, what: str) -> Path:
    """A result's file, by configuration and data, so that another question never finds this one's answer."""
    asked = {key: config.model_dump(mode="json")[key] for key in ("model", "optimizer", "train")}
    asked |= {"format": FORMAT, "data": study.data_digest}
    digest = hashlib.sha256(canonical_json(asked)).hexdigest()[:10]
    return study.out / "runs" / slug(cell.name) / f"{what}-{digest}.json"


def slug(name: str) -> str:
    """A cell's name as a folder's."""
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", name).strip("_")


def digest_of(dataset: PreparedDataset) -> str:
    """SHA-256 of what a data set holds."""
    return hashlib.sha256(canonical_json(dataset.manifest["files"])).hexdigest()


def open_study(study: Study) -> dict[str, Any]:
    """Write study.json and return what it has of earlier calls; InputError where it is of other data or format."""
    path = study.out / "study.json"
    try:
        study.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{study.out} cannot be made: {error.strerror}") from None
    known: dict[str, Any] = read_json(path, "ablation") if path.is_file() else {}
    if known and known.get("data_digest") != study.data_digest:
        raise InputError(f"{study.out} holds an ablation on other data ({known.get('data')}); choose another --out")
    if known and known["format"] != FORMAT:
        raise InputError(
            f"{study.out} has format {known['format']}; this program writes {FORMAT}: choose another --out"
        )
    asked = {
        "format": FORMAT,
        "name": study.name,
        "data": str(study.data),
        "data_digest": study.data_digest,
        "baseline": study.baseline,
        "seeds": study.seeds,
        "trials": study.trials,
        "cells": {cell.name: cell.config.model_dump(mode="json") for cell in study.cells},
    }
    remember(study, {**known, **asked})
    return known


def remember(study: Study, facts: dict[str, Any]) -> None:
    """Add to study.json."""
    path = study.out / "study.json"
    known = read_json(path, "ablation") if path.is_file() else {}
    with file_written_whole(path) as aside:
        write_json(aside, {**known, **facts})


def statistics(study: Study, outcomes: list[Outcome], dataset: PreparedDataset) -> dict[str, CellStatistics]:
    """Estimates and differences of every cell that has finished runs."""
    test = dataset.split("test")
    label_N = test[LABEL].to_numpy()
    cluster_N = clusters_of(groups_of(test), len(label_N))

    def scores() -> Iterator[tuple[str, Mapping[int, np.ndarray]]]:
        for outcome in outcomes:
            paths = {seed: _job(study, outcome, seed).scores for seed in outcome.done}
            yield outcome.cell.name, {seed: np.load(path, allow_pickle=False) for seed, path in paths.items() if path}

    return compare(label_N, cluster_N, scores(), baseline=study.baseline)


def facts_of_data(dataset: PreparedDataset) -> dict[str, Any]:
    """What a reader has to know of the test split: its rows, clicks and groups, and how sure an AUC on it is."""
    test = dataset.split("test")
    label_N, group_N = test[LABEL].to_numpy(), groups_of(test)
    clicks = int(label_N.sum())
    profile = read_json(dataset.path / "profile.json", "prepared data")
    return {
        "schema": dataset.schema.name,
        "rows": {name: dataset.files(name).num_rows for name in dataset.splits},
        "test_rows": len(label_N),
        "test_clicks": clicks,
        "group": dataset.schema.group,
        "groups": None if group_N is None else len(set(group_N.tolist())),
        "auc_error": auc_standard_error(0.7, clicks, len(label_N) - clicks) if 0 < clicks < len(label_N) else None,
        "best_possible": profile.get("best_possible"),
    }
