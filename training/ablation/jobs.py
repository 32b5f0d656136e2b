"""Runs of an ablation: one training each, in worker processes, with a result file that a restart finds again."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from features.files import file_written_whole, read_json, write_json
from training.config import Config
from training.workers import DIVERGED, DONE, Workers, died, outcome

DIAGNOSED_ROWS = 20_000  # of the test split
LANDSCAPE_ROWS = 4096  # of these


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training: a cell with a learning rate and a seed. `result` is written when it ends, however it ends.

    `scores`, where given, gets the test split's scores as a .npy file, and the result gets what they are worth, the
    network's diagnostics and, with `landscape`, its curvature and loss surface.
    """

    cell: str
    config: Config
    data: Path
    result: Path
    scores: Path | None = None
    landscape: bool = False

    def finished(self) -> dict[str, Any] | None:
        """The result of an earlier run, unless it failed for another reason than the numbers, or lacks something."""
        if not self.result.is_file():
            return None
        found: dict[str, Any] = read_json(self.result, "ablation")
        whole = found["status"] == DIVERGED or (
            found["status"] == DONE
            and (self.scores is None or self.scores.is_file())
            and (not self.landscape or "landscape" in found)
        )
        return found if whole else None


def run_jobs(jobs: Sequence[Job], processes: int, done: Callable[[Job, dict[str, Any]], None]) -> None:
    """Run jobs in worker processes; `done` is called here with each result, also of those that an earlier run has.

    A job that fails is a result with that status. So is one whose process dies; a restart tries it again.
    """
    waiting = []
    for job in jobs:
        found = job.finished()
        if found is None:
            waiting.append(job)
        else:
            done(job, found)
    left = iter(waiting)
    Workers(lambda: next(left, None), run_job, _lost, done).run(processes)


def _lost(job: Job) -> dict[str, Any]:
    return _record(job, died())


def run_job(job: Job) -> dict[str, Any]:
    """Train, score, measure; never raises for what goes wrong in it."""
    started = time.perf_counter()
    result = outcome(lambda: _train_and_measure(job))
    return _record(job, {**result, "seconds": time.perf_counter() - started})


def _record(job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """Write a result and return it; an earlier one that came to an end is not replaced by one that did not."""
    named = {"cell": job.cell, "seed": job.config.train.seed, "lr": job.config.optimizer.dense.lr, **result}
    if result["status"] != DONE and job.result.is_file():
        earlier: dict[str, Any] = read_json(job.result, "ablation")
        if earlier["status"] == DONE:
            return earlier
    finite: dict[str, Any] = _finite(named)
    with file_written_whole(job.result) as aside:
        write_json(aside, finite)
    return finite


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _train_and_measure(job: Job) -> dict[str, Any]:
    from training.distributed import join_world
    from training.fit.dataset import Going, fit_dataset
    from training.fit.starting import build_model
    from training.progress import Silent

    dataset = _dataset(job.data)
    with join_world() as world, TemporaryDirectory() as folder:
        going = Going(checkpoints=Path(folder), failed=job.result.with_suffix(".failed"), observer=Silent())
        fitted = fit_dataset(job.config, dataset, world, going)
    weights = fitted.weights
    assert weights is not None  # of rank 0
    result: dict[str, Any] = {"status": DONE, **fitted.position.summary()}
    if job.scores is not None:
        model = build_model(job.config.model, dataset)
        model.load_weights(weights.network, [weights.tables[name] for name in model.table_names])
        result |= _measure(job, dataset, model, weights.id_maps)
    return result


def _measure(job: Job, dataset: Any, model: Any, id_maps: dict[str, Any]) -> dict[str, Any]:
    """Test metrics by the one scorer, diagnostics of the blocks, and the landscape where it is asked for."""
    from features.dataset import LABEL, groups_of
    from features.metrics import score_metrics
    from serving.scorer import Scorer
    from training.ablation.diagnostics import diagnose, sampled
    from training.ablation.landscape import curvature, surface

    assert job.scores is not None  # the caller has looked
    test = _split(job.data, "test")
    score_N = Scorer(dataset.pipeline, [model], dataset.schema.sampling_rate, id_maps).score_encoded(test)
    with file_written_whole(job.scores) as aside, aside.open("wb") as file:
        np.save(file, score_N, allow_pickle=False)
    label_N = test[LABEL].to_numpy()
    sample = sampled(model, dataset, test.slice(0, min(DIAGNOSED_ROWS, test.num_rows)), id_maps)
    result = {
        "test": score_metrics(label_N, score_N, groups_of(test)),
        "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
        "diagnostics": diagnose(model.network, sample),
    }
    if job.landscape:
        rows = (sample.emb_BFd[:LANDSCAPE_ROWS], sample.label_B[:LANDSCAPE_ROWS], sample.weight_B[:LANDSCAPE_ROWS])
        plane = surface(model.network, *rows)
        result["landscape"] = {
            "curvature": asdict(curvature(model.network, *rows)),
            "axis": plane.axis_K.tolist(),
            "loss": plane.loss_KK.tolist(),
        }
    return result


@lru_cache(maxsize=1)
def _dataset(path: Path) -> Any:
    from features.dataset import PreparedDataset

    return PreparedDataset.open(path)


@lru_cache(maxsize=1)
def _split(path: Path, name: str) -> Any:
    return _dataset(path).split(name)
