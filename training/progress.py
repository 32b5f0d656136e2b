"""What a person sees while training runs: a progress bar on a terminal, a line per epoch elsewhere."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from training.fit.observer import Observer
from training.numbers import number

if TYPE_CHECKING:
    from training.tracking.run import Run  # and MLflow with it, which not all that shows progress has

_EPOCH_NAMES = {"train_loss": "epoch_train_loss"}  # every step's loss has the bare name


def teller(console: Console) -> Callable[[str], None]:
    """Gives a person a line that stays, of something to know that ends nothing."""

    def tell(message: str) -> None:
        console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)

    return tell


class TrainingObserver(Observer):
    """Passes the loop's news on to the terminal (standard error) and to MLflow."""

    def __init__(self, run: "Run", console: Console) -> None:
        self._run, self._console = run, console
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._member = ""  # which of several; what it reports has a name of its own, for its steps begin anew

    def __enter__(self) -> "TrainingObserver":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def planned(self, text: str, notes: Sequence[str]) -> None:
        """Lines that stay, and the plan to MLflow."""
        self._run.text(text, "plan.txt")
        for note in notes:
            self.noted(note)

    def member_started(self, number: int, of: int) -> None:
        """A line that stays; the first member's numbers have the names that a model alone has."""
        self._member = f"member_{number:02d}/" if number else ""
        self._console.print(f"member {number + 1} of {of}", highlight=False)

    def pass_started(self, name: str, steps: int, done: int) -> None:
        """A fresh bar for the epoch or day."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=steps, completed=done, numbers="")

    def steps_done(
        self, step: int, losses: list[float], auc: float | None, samples_per_second: float, **numbers: float
    ) -> None:
        """Move the bar, record every step's loss; `numbers` are recorded under their names."""
        self._run.series(f"{self._member}train_loss", step - len(losses) + 1, losses)
        if numbers.get("skipped_batches") == 0:  # as nearly always: no chart of it
            del numbers["skipped_batches"]
        self._record(step, {"samples_per_second": samples_per_second, "train_auc": auc, **numbers})
        self._run.flush()  # a checkpoint may follow, and what came before one is never gone through again
        if self._task is not None:
            seen = "" if auc is None else f" auc {auc:.4f}"
            shown = f"loss {losses[-1]:.4f}{seen} {samples_per_second:,.0f} samples/s"
            self._bar.update(self._task, advance=len(losses), numbers=shown)

    def epoch_done(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """A line that stays, and the validation's numbers to MLflow."""
        renamed = {_EPOCH_NAMES.get(name, f"valid_{name}"): value for name, value in metrics.items()}
        self._record(step, {**renamed, "epoch": epoch + 1})
        self._run.flush()
        self._console.print(
            f"epoch {epoch + 1:3d}  train loss {metrics['train_loss']:.4f}  "
            f"valid logloss {metrics['logloss']:.4f}  auc {metrics['auc']:.4f}",
            highlight=False,
        )

    def _record(self, step: int, metrics: dict[str, float | None]) -> None:
        self._run.metrics(step, {f"{self._member}{name}": value for name, value in metrics.items()})

    def day_scored(self, name: str, index: int, step: int, metrics: dict[str, float | None]) -> None:
        """A line that stays, and the day's numbers to MLflow."""
        self._run.metrics(step, {f"progressive_{key}": value for key, value in metrics.items()} | {"day": index + 1})
        self._run.flush()
        numbers = "  ".join(f"{key} {number(metrics[key])}" for key in ("logloss", "auc", "calibration"))
        self._console.print(f"{name}, before training on it  {numbers}", markup=False, highlight=False)

    def noted(self, message: str) -> None:
        """A line that stays."""
        teller(self._console)(message)

    def checkpoint_follows(self) -> None:
        """The records so far, to disk."""
        self._run.flush()


@contextmanager
def stages(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage that is told of by its name, and how much of how many parts is done; on a terminal only."""
    bar = Progress(
        TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total)
        bar.update(tasks[stage], completed=done, total=total)

    with bar:
        yield progress


class Silent(Observer):
    """The observer of every rank but 0, which does nothing."""
