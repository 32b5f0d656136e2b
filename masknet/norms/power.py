"""PowerNorm: division by the running root mean square of each channel."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from masknet.kernels import dispatch
from masknet.norms.base import Affine, Count, Formula, Share, Steps
from masknet.norms.running import Mean, RunningNorm, mean_of, mean_over_rows, num_ranks


class PowerBase(RunningNorm):
    """γ, β, and the running mean square of each channel, which evaluation divides by the root of."""

    running_power: torch.Tensor

    def __init__(self, shape: tuple[int, ...], *, eps: float, alpha: float) -> None:
        super().__init__(shape, eps=eps)
        self.alpha = alpha
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_power", torch.ones(shape))

    def affine(self) -> Affine:
        """What evaluation does, in terms that gradients go through."""
        return Affine(self.weight * torch.rsqrt(self.running_power + self.eps), self.bias)

    def normalize(self, x: torch.Tensor, instance: torch.Tensor | None) -> torch.Tensor:
        """x over its channel's root mean square, with an affine."""
        if not self.training:
            return self.evaluated(x)
        return self.normalize_rows(x) * self.weight + self.bias

    def normalize_rows(self, x: torch.Tensor) -> torch.Tensor:
        """x over a root mean square, in training."""
        raise NotImplementedError

    def update_power(self, power: Mean) -> None:
        """Move the running mean square on."""
        pooled = self.pooled("power", power.rows, power.value)
        if pooled is not None:
            self.count_step()
            self.running_power.lerp_(pooled[1], self.share_of_new(1.0 - self.alpha))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}"


class PowerNormV(PowerBase):
    """y = γ ⊙ x / √(mean_B(x²) + eps) + β over rows: PN-V of Shen et al., arXiv 2003.07845.

    Batch norm without the mean. Its gradient is the exact one; evaluation uses the running mean square, of which a step
    keeps the share `alpha`. Changed: the running mean begins as an even one (see `RunningNorm.share_of_new`).
    """

    scale_invariant = True

    def __init__(self, shape: tuple[int, ...], *, eps: float, alpha: Share = 0.9) -> None:
        super().__init__(shape, eps=eps, alpha=alpha)

    def normalize_rows(self, x: torch.Tensor) -> torch.Tensor:
        return x * self._inverse(x)

    def _inverse(self, x: torch.Tensor) -> torch.Tensor:
        power = mean_over_rows(x.square())
        self.update_power(power)
        return torch.rsqrt(power.value + self.eps)

    has_formula = True

    def formula(self, x: torch.Tensor) -> Formula:
        if not self.training:
            return super().formula(x)
        return Formula("affine", self.weight * self._inverse(x.float()), self.bias)


class PowerNorm(PowerBase):
    """y = γ ⊙ x / √(ψ² + eps) + β with ψ² the running mean square before this step (Shen et al., arXiv 2003.07845).

    PN, the paper's algorithm 2. The backward pass estimates the gradient through the statistics by a running ν:
    dx = (g − ν z) / √(ψ² + eps) with g = γ ⊙ dy and z = x / √(ψ² + eps), and then
    ν ← ν (1 − (1 − α_b) Γ) + (1 − α_b) Λ with Γ = mean_B(z²), Λ = mean_B(g ⊙ z). In sIncerass/powernorm
    (fairseq/modules/norms/mask_powernorm.py) the same ν is (1 − α_b) · ema_gz.

    For the first `warmup_steps` it is PN-V with the exact gradient, while ψ² and ν settle. `group_scaling` G first
    divides each of G parts of a row by its root mean square (GroupScaling1D there); then evaluation is no affine.

    Changed: warm-up ends after 100 steps instead of thousands, for models that see their data a few times; ψ² begins
    as an even mean, where the authors' code updates it twice a step; after warm-up dx divides by the ψ of the forward
    pass, as in the paper, and not by the batch's, as in their code. Γ is held to 1/(1 − α_b): from 2/(1 − α_b) on the
    recursion for ν diverges, when a channel that was nearly silent wakes up (their issue 2, "ema_gz … finally NaN").
    ν is kept in units of the mean loss over ranks, so that it does not depend on their number.
    """

    odd = True
    ema_gradient: torch.Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        eps: float,
        alpha: Share = 0.9,
        alpha_backward: Share = 0.9,
        warmup_steps: Steps = 100,
        group_scaling: Count | None = None,
    ) -> None:
        super().__init__(shape, eps=eps, alpha=alpha)
        if group_scaling is not None and shape[-1] % group_scaling:
            raise ValueError(f"power: group_scaling {group_scaling} does not divide a width of {shape[-1]}")
        self.alpha_backward, self.warmup_steps, self.group_scaling = alpha_backward, warmup_steps, group_scaling
        self.register_buffer("ema_gradient", torch.zeros(shape))

    def normalize(self, x: torch.Tensor, instance: torch.Tensor | None) -> torch.Tensor:
        return super().normalize(self.core(x), instance)

    def core(self, x: torch.Tensor) -> torch.Tensor:
        """x with its groups scaled, if they are."""
        if self.group_scaling is None:
            return x
        grouped = torch.unflatten(x, -1, (self.group_scaling, -1))
        return (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)).flatten(-2)

    def normalize_rows(self, x: torch.Tensor) -> torch.Tensor:
        warming_up = self.num_steps < self.warmup_steps
        power = mean_over_rows(x.detach().square())
        used = power.value if warming_up else self.running_power.clone()
        self.update_power(power)
        inverse = torch.rsqrt(used + self.eps)
        z: torch.Tensor = _DividedByPower.apply(x, inverse, self, warming_up)  # type: ignore[no-untyped-call]
        return z

    @property
    def has_formula(self) -> bool:
        return self.group_scaling is None and not self.training

    @property
    def has_fused_step(self) -> bool:
        return self.training and self.group_scaling is None and self.num_steps >= self.warmup_steps

    def fused_step(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        fused: torch.Tensor = _FusedPower.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, self, activation
        )
        return fused

    def update_gradient(self, rows: torch.Tensor, power: torch.Tensor, product: torch.Tensor) -> None:
        """Move ν on, by Γ and Λ over the rows of all ranks."""
        pooled = self.pooled("gradient", rows, power, product)
        if pooled is not None:
            new = 1.0 - self.alpha_backward
            keep = 1.0 - new * pooled[1].clamp(max=1.0 / new)
            self.ema_gradient.mul_(keep).add_(pooled[2], alpha=new / num_ranks())

    def separated(self) -> Affine | None:
        return super().fold()

    def fold(self) -> Affine | None:
        return None if self.group_scaling is not None else super().fold()

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, alpha_backward={self.alpha_backward}, warmup_steps={self.warmup_steps}, "
            f"group_scaling={self.group_scaling}"
        )


class _DividedByPower(torch.autograd.Function):
    """z = x ⊙ inverse, whose backward pass stands for the way of the gradient through the statistics in `inverse`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, inverse: torch.Tensor, norm: PowerNorm, exact: bool) -> torch.Tensor:
        z = x * inverse
        ctx.save_for_backward(z, inverse)
        ctx.norm, ctx.exact = norm, exact
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        z, inverse = ctx.saved_tensors
        norm: PowerNorm = ctx.norm
        rows, means = mean_over_rows(torch.stack([z.square(), g * z], dim=1))
        # a copy: what follows moves the buffer on
        estimate = means[1] if ctx.exact else norm.ema_gradient * num_ranks()
        norm.update_gradient(rows, means[0], means[1])
        return (g - estimate * z) * inverse, None, None, None


class _FusedPower(torch.autograd.Function):
    """PowerNorm and its activation after warm-up, by kernels that take the statistics beside their output."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, norm: PowerNorm, activation: str
    ) -> torch.Tensor:
        inverse = torch.rsqrt(norm.running_power + norm.eps)
        out, squares = dispatch.power_norm_act(x, inverse, weight, bias, activation)
        power = mean_of(squares, x.shape[0])
        norm.update_power(power)
        ctx.save_for_backward(x, inverse, weight, bias, power.value)
        ctx.norm, ctx.activation = norm, activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inverse, weight, bias, power = ctx.saved_tensors
        norm: PowerNorm = ctx.norm
        estimate = norm.ema_gradient * num_ranks()
        dx, dweight, dbias, products = dispatch.power_norm_act_backward(
            dy, x, inverse, weight, bias, estimate, ctx.activation
        )
        rows, product = mean_of(products, x.shape[0])
        norm.update_gradient(rows, power * inverse.square(), product)
        return dx, dweight, dbias, None, None
