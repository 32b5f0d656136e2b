"""Layer normalization and its forms without centring and with an affine of the instance's."""

import torch
from torch import nn
from torch.nn import functional

from masknet.norms.base import Count, Norm, RowNorm, variance

# From so many rows up to so many entries a CPU normalizes embeddings faster in steps, each of which goes over all rows
# while they are in the cache, than by torch's one operation, which goes row by row: 0.14 ms against 0.23 for 500 x 19
# rows of 10.
_ROWS, _ENTRIES = 1000, 1 << 20


class LayerNorm(RowNorm):
    """y = γ ⊙ (x − mean(x)) / √(var(x) + eps) + β over the last axis, biased variance (Ba et al., arXiv 1607.06450).

    Differs from torch.nn.LayerNorm in that only the last axis is normalized while the affine spans all of `shape`: with
    (F, d) one operation does the work of F separate layers. Statistics are computed in fp32 or wider.
    """

    kind = "layer"
    odd = False  # other signs, another mean
    scale_invariant = True
    by_size = True  # whether the way in which embeddings are normalized, and so their rounding, may depend on how many

    def forward(self, x: torch.Tensor, instance: torch.Tensor | None = None) -> torch.Tensor:
        """LN(x); of a hidden vector of bf16 on a CPU by torch's own kernel for it, whose statistics are fp32."""
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and len(self.shape) == 1:
            return functional.layer_norm(x, self.shape, self.weight, self.bias, self.eps).to(x.dtype)
        return super().forward(x, instance)

    def core(self, x: torch.Tensor) -> torch.Tensor:
        """x centred and over its deviation."""
        if x.dim() == 3 and x.device.type == "cpu" and not torch.is_grad_enabled() and self._in_steps(x):
            centred = x - x.mean(-1, keepdim=True)
            return centred.mul_(centred.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_())
        return functional.layer_norm(x, self.shape[-1:], eps=self.eps)

    def _in_steps(self, x: torch.Tensor) -> bool:
        if torch.compiler.is_compiling():  # one program for all sizes
            return False
        return not self.by_size or (x.numel() >= _ROWS * x.shape[-1] and x.numel() <= _ENTRIES)

    def normalize(self, x: torch.Tensor, instance: torch.Tensor | None) -> torch.Tensor:
        """LN(x); of a hidden vector in one pass, which on a CPU saves most of the time."""
        if len(self.shape) > 1 or self.bias is None:
            return super().normalize(x, instance)
        return functional.layer_norm(x, self.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class VarianceOnlyNorm(RowNorm):
    """y = γ ⊙ x / √(var(x) + eps) + β over the last axis: the variance about the mean, but no centring.

    VO-LN of MaskNet's authors (Wang et al., arXiv 2006.12753), who found the variance to be what helps. The paper's
    formula was not at hand, only its abstract: that γ and β stay, as in their layer norm, is from memory. Unlike
    RMSNorm it divides by the spread about the mean, so a row far from 0 keeps a large mean; a constant row is divided
    by √eps.
    """

    kind = "variance_only"
    odd = False  # other signs, another mean
    scale_invariant = True

    def core(self, x: torch.Tensor) -> torch.Tensor:
        """x over its spread."""
        return x * torch.rsqrt(variance(x) + self.eps)


class ConditionalLayerNorm(Norm):
    """y = x̂ ⊙ (γ + Δγ(V)) + β + Δβ(V), x̂ the layer norm of x and V [B, D] the raw embedding.

    [Δγ, Δβ] = P · relu(Q · V + q) + p with `rank` units between, P and p starting at 0: it starts as LayerNorm. A mask
    in front of a layer norm's output does the same with tied deltas, m ⊙ γ and m ⊙ β; this is the untied form. Deltas
    of the affine are LaVi's (arXiv 2506.16691, cited from memory) and DiMR's TD-LN (arXiv 2406.09416, likewise); the
    two layers with a bottleneck, in the shape of the instance-guided mask, are this project's choice.
    """

    scale_invariant = True
    conditional = True

    def __init__(self, shape: tuple[int, ...], *, eps: float, instance_width: int, rank: Count = 16) -> None:
        super().__init__(shape, eps=eps)
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.aggregate = nn.Linear(instance_width, rank)
        self.project = nn.Linear(rank, 2 * self.weight.numel())
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def normalize(self, x: torch.Tensor, instance: torch.Tensor | None) -> torch.Tensor:
        """LN(x) with the instance's own affine."""
        if instance is None:
            raise ValueError("a conditional layer norm needs the instance, the raw embedding [B, D]")
        raw = instance.to(self.aggregate.weight.dtype)
        deltas = self.project(functional.relu(self.aggregate(raw))).to(x.dtype)
        scale, shift = deltas.view(-1, 2, *self.shape).unbind(1)
        return self.core(x) * (self.weight + scale) + self.bias + shift

    def core(self, x: torch.Tensor) -> torch.Tensor:
        """The layer norm before the instance's affine."""
        return functional.layer_norm(x, self.shape[-1:], eps=self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.aggregate.out_features}"
