"""What the steps were, gathered over some of them: losses, speed, the running AUC; and whether a rank is to stop."""

import time
from collections.abc import Callable

import numpy as np
import torch

from features.metrics import auc
from training.distributed import World, sum_over_ranks
from training.fit.observer import Observer
from training.fit.state import Position
from training.fit.task import StepOutput

REPORT_STEPS = 10
AUC_WINDOW = 65_536  # rows of the running training AUC that the progress bar shows


class Reporter:
    """Gathers steps and reports them together, so that ranks exchange losses every few steps only.

    Args:
        position: told of losses, samples and seconds.
        world: this process.
        observer: told of the steps, on rank 0.
        stop_asked: whether this process was asked to stop.
        numbers: what else is reported of the last so many steps, by name.
    """

    def __init__(
        self,
        position: Position,
        world: World,
        observer: Observer,
        stop_asked: Callable[[], bool],
        numbers: Callable[[int], dict[str, float]],
    ) -> None:
        self.stopping = False  # whether any rank was asked to; the same on all ranks after the same step
        self._position, self._world, self._observer = position, world, observer
        self._stop_asked, self._numbers = stop_asked, numbers
        self._pending: list[tuple[StepOutput, bool]] = []  # and whether it counts, not being skipped
        self._logit_N, self._label_N = np.empty(0, np.float32), np.empty(0, np.float32)
        self._since = 0.0

    def begin(self) -> None:
        """Steps begin, after something else that took time."""
        self._since = time.perf_counter()

    def add(self, output: StepOutput, *, skipped: bool) -> None:
        """Take note of a step."""
        self._pending.append((output, not skipped))
        if len(self._pending) == REPORT_STEPS:
            self.flush()

    def flush(self) -> None:
        """Report what is pending; every rank must call this after the same step."""
        if not self._pending:
            return
        rows, asked = float(sum(len(output.label_B) for output, _ in self._pending)), float(self._stop_asked())
        losses = torch.stack([output.loss for output, _ in self._pending]).double()
        exchanged = sum_over_ranks(torch.cat([losses, losses.new_tensor([rows, asked])])).tolist()
        means = [loss / self._world.size for loss in exchanged[:-2]]
        self.stopping = self.stopping or exchanged[-1] > 0
        now = time.perf_counter()
        self._count(means, int(exchanged[-2]), now - self._since)
        if self._world.is_main:
            self._observer.steps_done(
                self._position.step,
                means,
                self._running_auc(),
                exchanged[-2] / (now - self._since),
                **self._numbers(len(self._pending)),
                skipped_batches=self._position.skipped,
            )
        self._since = now
        self._pending.clear()

    def _count(self, losses: list[float], rows: int, seconds: float) -> None:
        position = self._position
        counted = [loss for loss, (_, counts) in zip(losses, self._pending, strict=True) if counts]
        position.loss_sum += sum(counted)
        position.loss_steps += len(counted)
        position.skipped += len(losses) - len(counted)
        position.samples += rows
        position.seconds += seconds

    def _running_auc(self) -> float | None:
        kept = [output for output, counts in self._pending if counts]
        self._logit_N = self._newest(self._logit_N, [output.logit_B for output in kept])
        self._label_N = self._newest(self._label_N, [output.label_B for output in kept])
        return auc(self._label_N, self._logit_N) if len(self._label_N) else None

    def _newest(self, kept_N: np.ndarray, more: list[torch.Tensor]) -> np.ndarray:
        return np.concatenate([kept_N, *(part.float().cpu().numpy() for part in more)])[-AUC_WINDOW:]
