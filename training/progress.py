"""What a person sees while training runs: a progress bar on a terminal, a line per epoch elsewhere."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from training.tracking import Run


class TrainingObserver:
    """Passes the loop's news on to the terminal (standard error) and to MLflow."""

    def __init__(self, run: Run, console: Console) -> None:
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

    def __enter__(self) -> "TrainingObserver":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def epoch_started(self, epoch: int, steps: int) -> None:
        """A fresh bar for the epoch."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(f"epoch {epoch + 1}", total=steps, numbers="")

    def steps_done(self, step: int, losses: list[float], auc: float | None, samples_per_second: float) -> None:
        """Move the bar, record every step's loss."""
        first = step - len(losses) + 1
        for offset, loss in enumerate(losses):
            self._run.metrics(first + offset, {"train_loss": loss})
        self._run.metrics(step, {"samples_per_second": samples_per_second})
        if self._task is not None:
            seen = "" if auc is None else f" auc {auc:.4f}"
            numbers = f"loss {losses[-1]:.4f}{seen} {samples_per_second:,.0f} samples/s"
            self._bar.update(self._task, advance=len(losses), numbers=numbers)

    def epoch_done(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """A line that stays, and the validation's numbers to MLflow."""
        self._run.metrics(step, {"valid_logloss": metrics["logloss"], "valid_auc": metrics["auc"], "epoch": epoch + 1})
        self._run.flush(step)
        self._console.print(
            f"epoch {epoch + 1:3d}  train loss {metrics['train_loss']:.4f}  "
            f"valid logloss {metrics['logloss']:.4f}  auc {metrics['auc']:.4f}",
            highlight=False,
        )


class Silent:
    """The observer of every rank but 0."""

    def epoch_started(self, epoch: int, steps: int) -> None:
        """Nothing."""

    def steps_done(self, step: int, losses: list[float], auc: float | None, samples_per_second: float) -> None:
        """Nothing."""

    def epoch_done(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Nothing."""
