"""Normalizations by statistics of each channel over the rows: how rows, ranks and steps are put together.

A channel is one entry of a norm's shape, (F, d) or (h,). Statistics are those of the global batch: with several
processes they are all-reduced, in the forward pass and in the backward pass. Of a step that accumulates the gradients
of several smaller batches, running statistics see the whole (`set_accumulation`).
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx

from masknet.norms.base import Affine, Formula, Norm


def num_ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _SumOverRanks(torch.autograd.Function):
    """Sum over all processes; every process's loss depends on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: torch.Tensor) -> torch.Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Elementwise sum over all processes, differentiable."""
    if num_ranks() == 1:
        return x
    total: torch.Tensor = _SumOverRanks.apply(x)  # type: ignore[no-untyped-call]
    return total


class Mean(NamedTuple):
    """Means over the rows of the global batch, and how many rows there were (a scalar tensor)."""

    rows: torch.Tensor
    value: torch.Tensor


def mean_over_rows(x: torch.Tensor) -> Mean:
    """Mean of each channel over the rows of all processes; 0 where there are no rows. Differentiable."""
    return mean_of(x.sum(0), x.shape[0])


def mean_of(total: torch.Tensor, num_rows: int) -> Mean:
    """`mean_over_rows` of a sum over this process's rows."""
    if num_ranks() > 1:
        own = torch.full((1,), float(num_rows), dtype=total.dtype, device=total.device)
        summed = sum_over_ranks(torch.cat([total.flatten(), own]))
        total, rows = summed[:-1].view(total.shape), summed[-1].detach()
    else:
        rows = torch.tensor(float(num_rows), dtype=total.dtype)  # on the CPU, where reading it waits for nothing
    return Mean(rows, total / rows.clamp(min=1))


class RunningNorm(Norm):
    """A norm with running statistics, updated once in a step from the rows of all its batches."""

    steps: torch.Tensor

    def __init__(self, shape: tuple[int, ...], *, eps: float) -> None:
        super().__init__(shape, eps=eps)
        self.accumulation = 1  # batches in a step
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._seen: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        self._counted: tuple[torch.Tensor, int, int] | None = None  # `steps`, its version, and its value

    @property
    def num_steps(self) -> int:
        """The value of `steps`, read from its device only when something else than `count_step` has changed it."""
        if self.steps.is_inference():  # such tensors have no versions
            return int(self.steps)
        seen = self._counted
        if seen is None or seen[0] is not self.steps or seen[1] != self.steps._version:
            seen = self._counted = (self.steps, self.steps._version, int(self.steps))
        return seen[2]

    def count_step(self) -> None:
        """Move `steps` on."""
        value = self.num_steps + 1
        self.steps += 1
        self._counted = None if self.steps.is_inference() else (self.steps, self.steps._version, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_counted": None}  # a copy counts its tensors' versions anew

    def affine(self) -> Affine:
        """What evaluation does, by the running statistics, in terms that gradients go through."""
        raise NotImplementedError

    def evaluated(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of x in evaluation."""
        affine = self.affine()
        return torch.addcmul(affine.shift, x, affine.scale)

    @property
    def has_formula(self) -> bool:
        return not self.training

    def formula(self, x: torch.Tensor) -> Formula:
        affine = self.affine()
        return Formula("affine", affine.scale, affine.shift)

    def fold(self) -> Affine | None:
        affine = self.affine()
        return Affine(affine.scale.detach(), affine.shift.detach())

    def pooled(self, kind: str, rows: torch.Tensor, *means: torch.Tensor) -> list[torch.Tensor] | None:
        """At a step's last batch, its rows and the means over them; None before, and where the step has no rows."""
        seen = self._seen.setdefault(kind, [])
        seen.append((rows, *(mean.detach() for mean in means)))
        if len(seen) < self.accumulation:
            return None
        del self._seen[kind]
        total = torch.stack([part[0] for part in seen]).sum(0)
        if not bool(total):
            return None
        sums = [torch.stack([part[0] * part[i] for part in seen]).sum(0) for i in range(1, len(means) + 1)]
        return [total, *(each / total for each in sums)]

    def share_of_new(self, share: float) -> float:
        """Weight of a step's statistic in a running mean: `share`, but 1/t in the first steps, an even mean.

        So what a buffer held before the first step leaves no trace. Beside embeddings of variance 1e-4 the usual start
        at 1 would stand out for a hundred steps. Call it after `steps` was moved on.
        """
        return max(share, 1.0 / max(1, self.num_steps))


def set_accumulation(network: torch.nn.Module, batches: int) -> None:
    """Say how many batches make an optimizer step; running statistics wait for the last of them."""
    for module in network.modules():
        if isinstance(module, RunningNorm):
            module.accumulation = batches
