"""What the loop tells of itself, as it is recorded and as a person reads it."""

from collections.abc import Mapping
from io import StringIO
from typing import Any, cast

from rich.console import Console

from training.progress import TrainingObserver
from training.tracking.run import Run


class Recorded:
    """Stands for a run; keeps what is on disk apart from what is not."""

    def __init__(self) -> None:
        self.pending: list[tuple[str, int, float]] = []
        self.kept: list[tuple[str, int, float]] = []

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        self.pending += [(name, step, value) for name, value in values.items() if value is not None]

    def series(self, name: str, first_step: int, values: list[float]) -> None:
        self.pending += [(name, first_step + offset, value) for offset, value in enumerate(values)]

    def flush(self) -> None:
        self.kept += self.pending
        self.pending = []


def observed(**more: Any) -> tuple[Recorded, TrainingObserver, StringIO]:
    run, heard = Recorded(), StringIO()
    return run, TrainingObserver(cast(Run, run), Console(file=heard, width=200)), heard


def test_every_step_has_its_loss_and_every_report_its_numbers_and_all_is_on_disk() -> None:
    run, observer, heard = observed()
    with observer:
        observer.pass_started("epoch 1", 6, 0)
        observer.steps_done(3, [0.7, 0.6, 0.5], None, 100.0, learning_rate=0.01, skipped_batches=0)
        observer.steps_done(6, [0.4, 0.3, 0.2], 0.75, 200.0, learning_rate=0.02, skipped_batches=1)
    assert run.pending == []
    assert [(step, value) for name, step, value in run.kept if name == "train_loss"] == [
        (1, 0.7),
        (2, 0.6),
        (3, 0.5),
        (4, 0.4),
        (5, 0.3),
        (6, 0.2),
    ]
    assert [entry for entry in run.kept if entry[0] != "train_loss"] == [
        ("samples_per_second", 3, 100.0),
        ("learning_rate", 3, 0.01),
        ("samples_per_second", 6, 200.0),
        ("train_auc", 6, 0.75),
        ("learning_rate", 6, 0.02),
        ("skipped_batches", 6, 1),
    ]
    assert heard.getvalue() == "", "no bar where there is no terminal"


def test_an_epoch_is_a_line_and_its_numbers() -> None:
    run, observer, heard = observed()
    with observer:
        observer.epoch_done(1, 20, {"train_loss": 0.61234, "logloss": 0.5, "auc": 0.75})
    assert run.kept == [
        ("epoch_train_loss", 20, 0.61234),
        ("valid_logloss", 20, 0.5),
        ("valid_auc", 20, 0.75),
        ("epoch", 20, 2),
    ]
    assert heard.getvalue() == "epoch   2  train loss 0.6123  valid logloss 0.5000  auc 0.7500\n"
