"""Bounding by a hyperbolic tangent instead of, or after, dividing by a statistic."""

import torch
from torch import nn

from masknet.norms.base import Count, Formula, Norm, Positive, RowNorm

HIDDEN_ALPHA, EMBEDDING_ALPHA = 0.5, 10.0


class DyT(RowNorm):
    """y = γ ⊙ tanh(α x) + β (Zhu et al., arXiv 2503.10622; jiachenzhu/DyT dynamic_tanh.py): no statistics at all.

    Changed: α is one scalar per normalized vector, so one per field for (F, d); it starts at the paper's 0.5 for a
    hidden vector and at 10 for embeddings, whose rows start at a standard deviation of .01 and grow in training: 0.5
    would leave them where tanh is the identity. `alpha` sets another start. Takes eps like the other norms and has no
    use for it.
    """

    kind = "dyt"

    def __init__(self, shape: tuple[int, ...], *, eps: float, alpha: Positive | None = None) -> None:
        super().__init__(shape, eps=eps)
        start = alpha if alpha is not None else EMBEDDING_ALPHA if len(shape) > 1 else HIDDEN_ALPHA
        self.alpha = nn.Parameter(torch.full((*shape[:-1], 1), start))

    def bounded(self, x: torch.Tensor) -> torch.Tensor:
        """What the tanh is taken of."""
        return x * self.alpha

    def core(self, x: torch.Tensor) -> torch.Tensor:
        """tanh(α x)."""
        return self.bounded(x).tanh()

    def kernel_arguments(self) -> tuple[torch.Tensor, float]:
        return self.alpha, 1.0


class BHyT(RowNorm):
    """y = γ ⊙ tanh((λ/κ) · x / √(mean(x²) + eps)) over the last axis (arXiv 2601.09719 v3).

    The exact form, BHyT_Star in MLAI-Yonsei/BHyT models/hf_src/llama/modeling_llama.py; the approximated variance of
    the paper's second norm is made for attention. By Chebyshev's inequality 1 − 1/κ² of x/RMS(x) lies within κ.
    Changed: λ is one learned scalar per normalized vector, and γ starts at κ/λ (`gain`), so that the output starts at
    about the scale of RMSNorm's; with the authors' 1 it starts at λ/κ = 0.2 of it.
    """

    kind = "bhyt"
    default_eps = 1e-6
    scale_invariant = True
    biased = False

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        eps: float,
        kappa: Positive = 10.0,
        bound: Positive = 2.0,
        gain: Positive | None = None,
    ) -> None:
        super().__init__(shape, eps=eps)
        self.kappa = kappa
        self.bound = nn.Parameter(torch.full((*shape[:-1], 1), bound))
        nn.init.constant_(self.weight, gain if gain is not None else kappa / bound)

    def bounded(self, x: torch.Tensor) -> torch.Tensor:
        """What the tanh is taken of."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.bound / self.kappa)

    def core(self, x: torch.Tensor) -> torch.Tensor:
        """tanh of the bounded x."""
        return self.bounded(x).tanh()

    def kernel_arguments(self) -> tuple[torch.Tensor, float]:
        return self.bound, self.kappa

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kappa={self.kappa}"


class SeeDNorm(Norm):
    """y = (tanh(x · β) α + γ) ⊙ x / √(mean(x²) + eps) over the last axis (arXiv 2510.22777).

    RMSNorm whose scale sees x: the product x · β reads the raw x, so that the size of x, which RMSNorm drops, can come
    through. With `heads` the last axis is cut into that many parts, each with a tanh of its own. No official repository
    was found: the formula is from the paper's description, and α = 1 at the start from memory; β starts at 0, so that
    it starts as RMSNorm. Weight decay of α and β, which the authors recommend (from memory), is the optimizer's.
    """

    def __init__(self, shape: tuple[int, ...], *, eps: float, heads: Count = 1) -> None:
        super().__init__(shape, eps=eps)
        if shape[-1] % heads:
            raise ValueError(f"seednorm: heads {heads} does not divide a width of {shape[-1]}")
        self.heads = heads
        self.weight = nn.Parameter(torch.ones(shape))
        self.alpha = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape))

    def normalize(self, x: torch.Tensor, instance: torch.Tensor | None) -> torch.Tensor:
        """RMSNorm with the scale that x itself gives."""
        parts = (self.heads, self.shape[-1] // self.heads)
        gate = torch.unflatten(x * self.beta, -1, parts).sum(-1, keepdim=True).tanh()
        scale = (gate * torch.unflatten(self.alpha, -1, parts)).flatten(-2) + self.weight
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * scale

    @property
    def has_formula(self) -> bool:
        return self.heads == 1 and len(self.shape) == 1

    def formula(self, x: torch.Tensor) -> Formula:
        return Formula("seednorm", self.weight, extra=torch.stack([self.alpha, self.beta]))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, heads={self.heads}"
