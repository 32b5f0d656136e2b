"""What a person sees while a study runs: a bar on a terminal, a line per trial elsewhere."""

from types import TracebackType

import optuna
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from training.numbers import number
from training.tuning.search import Metric, facts_of
from training.tuning.seeds import SeedJob
from training.workers import DONE, Result


class TuningProgress:
    """Trials, then seeds, as they end."""

    def __init__(self, console: Console, metric: Metric, trials: int | None) -> None:
        self._console, self._metric = console, metric
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(
            *columns,
            TextColumn("{task.fields[best]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._trials = self._bar.add_task("trials", total=trials, best="")
        self._seeds = self._bar.add_task("seeds", total=None, best="", visible=False)

    def __enter__(self) -> "TuningProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def trial_done(self, trial: optuna.trial.FrozenTrial, study: optuna.Study) -> None:
        """A trial of the study is over."""
        over = sum(other.state.is_finished() for other in study.get_trials(deepcopy=False))
        best, facts = _best(study), facts_of(trial)
        self._bar.update(self._trials, completed=over, best=f"best {self._metric} {number(best)}")
        if facts["status"] == DONE:
            told = f"{self._metric} {number(trial.value)} in {facts['seconds']:.0f} s, best {number(best)}"
        else:
            told = f"{facts['status']}: {facts['reason']}"
        self.say(f"trial {trial.number}: {told}")

    def seeds_begin(self, total: int) -> None:
        """The best configuration is trained with so many seeds."""
        self._bar.update(self._seeds, total=total, visible=True)

    def seed_done(self, job: SeedJob, result: Result) -> None:
        """One of them is over."""
        self._bar.advance(self._seeds)
        if result["status"] != DONE:
            self.say(f"seed {job.seed}: {result['status']}: {result['reason']}", always=True)
            return
        found = {split: metrics[self._metric] for split, metrics in result["metrics"].items()}
        self.say(f"seed {job.seed}: " + ", ".join(f"{split} {self._metric} {number(x)}" for split, x in found.items()))

    def say(self, line: str, always: bool = False) -> None:
        """A line that stays; on a terminal, where the bar tells, only what is wrong."""
        if always or not self._console.is_terminal:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _best(study: optuna.Study) -> float | None:
    try:
        return float(study.best_value)
    except ValueError:
        return None  # no trial came to an end yet
