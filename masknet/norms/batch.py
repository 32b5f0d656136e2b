"""Batch normalization, and the form of it that a layer normalization can turn into."""

import torch
from torch import nn

from masknet.norms.base import Affine, Formula, Norm, Share
from masknet.norms.layer import LayerNorm
from masknet.norms.running import RunningNorm, mean_over_rows


class BatchNorm(RunningNorm):
    """y = γ ⊙ (x − mean_B(x)) / √(var_B(x) + eps) + β, over rows (Ioffe and Szegedy, arXiv 1502.03167).

    In evaluation with running means, of the unbiased variance as in torch.nn.BatchNorm1d. `momentum` is the share of
    the new, torch's meaning. Changed: the running means begin as even ones (see `RunningNorm.share_of_new`); a batch of
    one row normalizes to β and leaves the running means as they are, where torch raises an error.
    """

    scale_invariant = True
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, shape: tuple[int, ...], *, eps: float, momentum: Share = 0.1) -> None:
        super().__init__(shape, eps=eps)
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))

    def normalize(self, x: torch.Tensor, instance: torch.Tensor | None) -> torch.Tensor:
        """BN(x)."""
        if not self.training:
            return self.evaluated(x)
        centred, _, scale = self._step(x)
        return torch.addcmul(self.bias, centred, scale)

    def _step(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x − mean, the mean, and γ over the deviation; running means see x."""
        rows, mean = mean_over_rows(x)
        centred = x - mean
        variance = mean_over_rows(centred.square()).value
        self._update(rows, mean, variance)
        return centred, mean, torch.rsqrt(variance + self.eps) * self.weight

    has_formula = True

    def formula(self, x: torch.Tensor) -> Formula:
        if not self.training:
            return super().formula(x)
        _, mean, scale = self._step(x.float())
        return Formula("affine", scale, self.bias, mean)

    def _update(self, rows: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
        pooled = self.pooled("batch", rows, mean, variance + mean.square())
        if pooled is None or not bool(pooled[0] > 1):
            return
        total, mean, square = pooled
        # E[x²] − E[x]² would lose digits, so of a step's only batch the variance is taken as it is.
        variance = variance.detach() if self.accumulation == 1 else (square - mean.square()).clamp(min=0)
        self.count_step()
        share = self.share_of_new(self.momentum)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (total / (total - 1)), share)

    def affine(self) -> Affine:
        """What evaluation does, in terms that gradients go through."""
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return Affine(scale, self.bias - self.running_mean * scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, momentum={self.momentum}"


class PRepBatchNorm(Norm):
    """λ · LN(x) + (1 − λ) · (BN(x) + η x), λ from 1 to 0 during training (Guo et al., arXiv 2405.11582).

    Trains like a layer norm early and serves as a linear layer: at λ = 0 it is one affine, of slope γ/√(var + eps) + η
    (xinghaochen/SLAB classification/models/prepbn.py). λ is 1 for the share `warm` of training and 0 from the share
    `until` on, linear between. Changed: while λ > 0 evaluation blends as training does, where the authors' code
    evaluates BN + η x alone, which means nothing yet; `until` is 4/5 of training, which their users found to work
    (SLAB, issue 6), instead of a number of steps, and no epoch before it is kept or ends the training.
    """

    blend: torch.Tensor

    def __init__(
        self, shape: tuple[int, ...], *, eps: float, momentum: Share = 0.1, warm: Share = 0.05, until: Share = 0.8
    ) -> None:
        super().__init__(shape, eps=eps)
        if not warm < until:
            raise ValueError(f"prepbn: warm {warm} must be less than until {until}")
        self.warm, self.until = warm, until
        self.layer = LayerNorm(shape, eps=eps)
        self.batch = BatchNorm(shape, eps=eps, momentum=momentum)
        self.slope = nn.Parameter(torch.ones(()))
        self.register_buffer("blend", torch.ones(()))

    def set_progress(self, done: float) -> None:
        """λ by the share of training that is done; it only falls, so that a trained norm stays what it has become."""
        self.blend.clamp_(max=max(0.0, 1.0 - (done - self.warm) / (self.until - self.warm)))

    @property
    def settled_from(self) -> float:
        """λ is 0 from there on."""
        return self.until if bool(self.blend) else 0.0

    def normalize(self, x: torch.Tensor, instance: torch.Tensor | None) -> torch.Tensor:
        """The blend."""
        linear = self.batch(x) + self.slope * x
        return torch.lerp(linear, self.layer(x), self.blend.to(x.dtype))

    def fold(self) -> Affine | None:
        if bool(self.blend):
            return None
        affine = self.batch.affine()
        return Affine((affine.scale + self.slope).detach(), affine.shift.detach())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, warm={self.warm}, until={self.until}"
