"""Who is told of a training: the terminal and MLflow, or nobody."""

from collections.abc import Sequence


class Observer:
    """Who wants to know how training goes; called on rank 0 only. Told, this one does nothing."""

    def planned(self, text: str, notes: Sequence[str]) -> None:
        """Where the tables are, as a table of text, and what a person should know of it."""

    def member_started(self, number: int, of: int) -> None:
        """Of an ensemble's `of` members the one with this number, from 0, is trained from here on."""

    def pass_started(self, name: str, steps: int, done: int) -> None:
        """A pass of `steps` steps begins, or goes on after `done` of them."""

    def steps_done(
        self, step: int, losses: list[float], auc: float | None, samples_per_second: float, **numbers: float
    ) -> None:
        """`step` steps are done in all; `losses` are the newest ones'; `numbers` are what else there is, by name."""

    def epoch_done(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """An epoch and its validation are done."""

    def day_scored(self, name: str, index: int, step: int, metrics: dict[str, float | None]) -> None:
        """A day was scored, before it is trained on."""

    def noted(self, message: str) -> None:
        """Something happened that a person should know and that does not end training."""

    def checkpoint_follows(self) -> None:
        """What was told so far is not told again by a training that goes on from the checkpoint to be written."""
