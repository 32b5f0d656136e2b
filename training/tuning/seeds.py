"""The best configuration trained with several seeds, as `masknet train` does it, in worker processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from training.config import Config
from training.errors import Failure, Stopped
from training.workers import DONE, FAILED, Result, Workers, died, outcome


@dataclass(frozen=True)
class SeedJob:
    """A whole training; `out` is as `masknet train` leaves it."""

    config: Config
    data: Path
    out: Path

    @property
    def seed(self) -> int:
        return self.config.train.seed


def seed_jobs(config: Config, data: Path, out: Path, seeds: int) -> list[SeedJob]:
    """Trainings with seeds 1 to `seeds`, in folders of their own below `out`."""
    trains = [config.train.model_copy(update={"seed": seed}) for seed in range(1, seeds + 1)]
    return [SeedJob(config.model_copy(update={"train": train}), data, out / f"seed-{train.seed}") for train in trains]


def train_seed(job: SeedJob) -> Result:
    """Train, or go on, without registering; never raises for what goes wrong in it."""
    return outcome(lambda: _train(job))


def _train(job: SeedJob) -> Result:
    from training.train import train

    try:
        found = train(job.config, job.data, job.out, Console(quiet=True), resume=True, register=False)
    except Stopped as stopped:
        return {"status": FAILED, "reason": str(stopped)}
    assert found is not None  # a world of one
    return {"status": DONE, **found}


def train_seeds(jobs: Sequence[SeedJob], processes: int, told: Callable[[SeedJob, Result], None]) -> dict[int, Result]:
    """The results by seed, of those that went wrong, too.

    Raises:
        Failure: none came to an end.
    """
    results: dict[int, Result] = {}

    def done(job: SeedJob, result: Result) -> None:
        results[job.seed] = result
        told(job, result)

    left = iter(jobs)
    Workers(lambda: next(left, None), train_seed, lambda _: died(), done).run(processes)
    if not any(result["status"] == DONE for result in results.values()):
        raise Failure(f"the best configuration came to an end with no seed; with seed 1: {results[1]['reason']}")
    return dict(sorted(results.items()))
