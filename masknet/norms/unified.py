"""Unified normalization: division by a geometric mean of the last steps' powers."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from masknet.norms.base import Count, Share, Steps
from masknet.norms.power import PowerBase
from masknet.norms.running import mean_over_rows, num_ranks

_RATIO = 5.0  # how far a step's scale may be from the running one


class UnifiedNorm(PowerBase):
    """y = γ ⊙ x / √(v + eps) + β, v the geometric mean over the last `window` steps of mean_B(x²), per channel.

    Unified Normalization (Yang et al., arXiv 2208.01313; hikvision-research/Unified-Normalization, class UN1d). The
    gradient statistic mean_B(g ⊙ z) is smoothed likewise, by an arithmetic mean over the window and a running mean of
    that; γ's gradient is taken as if z were normalized by the running statistic, which evaluation uses. For
    `warmup_steps` v is the batch's own. `outlier_filtering` (off for text, on for images in the authors' settings)
    skips the smoothing of a step in which some channel's arithmetic mean exceeds the geometric one by `window` times
    the variance of the window's roots.

    Changed: warm-up ends after 100 steps instead of 4,000, and the ratio of the step's to the running scale is set free
    with it, where the authors hold it at 1 for 1,000 steps at least; the running power begins as an even mean (see
    `RunningNorm.share_of_new`); logarithms are of eps at least, where the log(0) of a channel that one step leaves
    silent would make x / √eps of its next values; gradient statistics are in units of the mean loss over ranks. Of a
    step of several batches the running power sees the smoothed power of the whole. `alpha` is the share that is kept,
    called momentum there.
    """

    ema_gradient: torch.Tensor
    power_window: torch.Tensor
    gradient_window: torch.Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        eps: float,
        window: Count = 4,
        alpha: Share = 0.9,
        warmup_steps: Steps = 100,
        outlier_filtering: bool = False,
    ) -> None:
        super().__init__(shape, eps=eps, alpha=alpha)
        if window < 2:
            raise ValueError("unified: a window of 1 smooths nothing; it must be 2 at least")
        self.window, self.warmup_steps = window, warmup_steps
        self.outlier_filtering = outlier_filtering
        self.register_buffer("ema_gradient", torch.zeros(shape))
        self.register_buffer("power_window", torch.zeros(window, *shape))
        self.register_buffer("gradient_window", torch.zeros(window, *shape))

    def normalize(self, x: torch.Tensor, instance: torch.Tensor | None) -> torch.Tensor:
        """UN(x)."""
        if not self.training:
            return self.evaluated(x)
        step = self.num_steps + 1
        rows, power = mean_over_rows(x.detach().square())
        smooth = step > self.window and step >= self.warmup_steps
        used, skip = self._smoothed(power, step) if smooth else (power, False)
        ratio = torch.sqrt((used + self.eps) / (self.running_power + self.eps)).clamp(1 / _RATIO, _RATIO)
        if not smooth or skip:
            ratio = torch.ones_like(ratio)
        self._update_power(rows, power, used, smooth, skip, step)
        inverse = torch.rsqrt(used + self.eps)
        z: torch.Tensor = _DividedByWindow.apply(  # type: ignore[no-untyped-call]
            x, inverse, ratio, self.weight, self, smooth, skip, step
        )
        return z + self.bias

    def _windowed(self, power: torch.Tensor, step: int) -> torch.Tensor:
        """The window with this step's power in its place."""
        window = self.power_window.clone()
        window[step % self.window] = power
        return window

    def _smoothed(self, power: torch.Tensor, step: int) -> tuple[torch.Tensor, bool]:
        """The geometric mean over the window, or `power` as it is and True where an outlier is to be skipped."""
        window = self._windowed(power, step)
        geometric = window.clamp(min=self.eps).log().mean(0).exp()
        threshold = self.window * self.power_window.sqrt().var()
        if self.outlier_filtering and bool((window.mean(0) - geometric > threshold).any()):
            return power, True
        return geometric, False

    def _update_power(
        self, rows: torch.Tensor, power: torch.Tensor, used: torch.Tensor, smooth: bool, skip: bool, step: int
    ) -> None:
        pooled = self.pooled("power", rows, power)
        if pooled is None:
            return
        if self.accumulation > 1:
            power = pooled[1]
            used, skip = self._smoothed(power, step) if smooth else (power, False)
        self.count_step()
        self.power_window[step % self.window] = self.running_power if skip else power
        self.running_power.lerp_(used, self.share_of_new(1.0 - self.alpha))

    def gradient_estimate(
        self, rows: torch.Tensor, product: torch.Tensor, smooth: bool, skip: bool, step: int
    ) -> torch.Tensor:
        """mean_B(g ⊙ z) as the backward pass uses it, from this batch's; moves the running ones on."""
        window = self.gradient_window.clone()
        window[step % self.window] = self.ema_gradient if skip else product
        smoothed = window.mean(0) if smooth and not skip else product
        ema = torch.lerp(smoothed, self.ema_gradient, self.alpha)
        pooled = self.pooled("gradient", rows, window[step % self.window], ema)
        if pooled is not None:
            self.gradient_window[step % self.window] = pooled[1]
            self.ema_gradient.copy_(pooled[2])
        return smoothed if skip else ema

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}, warmup_steps={self.warmup_steps}"


class _DividedByWindow(torch.autograd.Function):
    """γ ⊙ z with z = x ⊙ inverse; the gradients of x and γ are the smoothed ones."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        inverse: torch.Tensor,
        ratio: torch.Tensor,
        weight: torch.Tensor,
        norm: UnifiedNorm,
        smooth: bool,
        skip: bool,
        step: int,
    ) -> torch.Tensor:
        z = x * inverse
        ctx.save_for_backward(z, inverse, ratio, weight)
        ctx.norm, ctx.smooth, ctx.skip, ctx.step = norm, smooth, skip, step
        return z * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, inverse, ratio, weight = ctx.saved_tensors
        norm: UnifiedNorm = ctx.norm
        g = dy * (weight * ratio)
        rows, product = mean_over_rows(g * z)
        ranks = num_ranks()
        estimate = norm.gradient_estimate(rows, product / ranks, ctx.smooth, ctx.skip, ctx.step) * ranks
        dx = (g - estimate * z) * inverse
        return dx, None, None, (dy * z).sum(0) * ratio, None, None, None, None
