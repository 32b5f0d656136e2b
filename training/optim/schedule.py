"""The course of the learning rates: warm-up, then constant, linear, cosine, or a fall whenever validation stalls."""

import math
from typing import Any

from torchrec.optim.keyed import CombinedOptimizer

from training.optim.optimizers import FUSED
from training.sections import ScheduleConfig


class Schedule:
    """Sets the rates of all the optimizer's parts before each step: each part's own rate times a common factor.

    Args:
        config: the course.
        optimizer: with its full rates; a part whose rate is 0 stays at 0.
        total_steps: steps of the whole training, at the last of which linear and cosine have come to `final`.
    """

    def __init__(self, config: ScheduleConfig, optimizer: CombinedOptimizer, total_steps: int) -> None:
        self._config = config
        self._peak = max(config.warmup_steps - 1, 0)  # the step at which the factor is 1 for the first time
        self._last = total_steps - 1
        self._optimizer, self._rates = optimizer, [float(group["lr"]) for group in optimizer.param_groups]
        self._fused = [part for name, part in optimizer.optimizers if name == FUSED]
        self._step, self._fall, self._stalled = 0, 1.0, 0
        self._best: float | None = None

    def factor(self, step: int) -> float:
        """What the rates are multiplied by in step `step`, counted from 0."""
        config = self._config
        if step < self._peak:
            return (step + 1) / config.warmup_steps
        done = min(1.0, (step - self._peak) / max(self._last - self._peak, 1))
        match config.name:
            case "linear":
                return 1.0 - (1.0 - config.final) * done
            case "cosine":
                return config.final + (1.0 - config.final) * (1.0 + math.cos(math.pi * done)) / 2.0
            case "plateau":
                return self._fall
            case "constant":
                return 1.0

    def begin_step(self, step: int) -> None:
        """Set the rates of step `step`, counted from 0; to be called before its forward pass."""
        self._step, factor = step, self.factor(step)
        groups = self._optimizer.param_groups  # anew: loading a state makes others, with other rates
        rates = [lr * factor for lr in self._rates]
        if rates == [group["lr"] for group in groups]:
            return
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        # Fused tables are updated within the backward pass, by a rate that zero_grad() hands to the kernel (no more).
        for part in self._fused:
            part.zero_grad()

    def epoch_done(self, value: float) -> None:
        """Take note of an epoch's validation, of which lower is better: plateau may lower the rates from here on.

        Epochs that end before the warm-up does are passed over.
        """
        if self._config.name != "plateau" or self._step < self._peak:
            return
        if self._best is None or value < self._best:
            self._best, self._stalled = value, 0
            return
        self._stalled += 1
        if self._stalled >= self._config.patience:
            self._fall, self._stalled = self._fall * self._config.factor, 0

    def state_dict(self) -> dict[str, float | None]:
        """Plain numbers."""
        return {"step": self._step, "fall": self._fall, "best": self._best, "stalled": self._stalled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; the rates follow with the next `begin_step`."""
        self._step, self._stalled = int(state["step"]), int(state["stalled"])
        self._fall, self._best = float(state["fall"]), state["best"]
