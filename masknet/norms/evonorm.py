"""EvoNorm-S0: a normalization and its activation in one."""

import torch
from torch import nn

from masknet.norms.base import Count, RowNorm, variance

_MOST_GROUPS, _LEAST_WIDTH = 32, 16


class EvoNormS0(RowNorm):
    """y = x · σ(v x) / √(var_group(x) + eps) ⊙ γ + β (Liu et al., arXiv 2004.02967): stands for norm and ReLU together.

    The variance, biased as in the authors' TensorFlow code (from memory; digantamisra98/EvoNorm uses the unbiased one),
    is over each of `groups` parts of the last axis. The paper has 32 groups of channels and positions; a vector has no
    positions, so by default there are as many groups as divide it with 16 entries each at least, up to 32.
    """

    odd = False
    replaces_activation = True

    def __init__(self, shape: tuple[int, ...], *, eps: float, groups: Count | None = None) -> None:
        super().__init__(shape, eps=eps)
        self.groups = groups if groups is not None else _default_groups(shape[-1])
        if shape[-1] % self.groups:
            raise ValueError(f"evonorm_s0: groups {self.groups} does not divide a width of {shape[-1]}")
        self.slope = nn.Parameter(torch.ones(shape))

    def core(self, x: torch.Tensor) -> torch.Tensor:
        """Swish over the spread within the group."""
        groups = (self.groups, self.shape[-1] // self.groups)
        inverse = torch.rsqrt(variance(torch.unflatten(x, -1, groups)) + self.eps)
        swish = x * torch.sigmoid(x * self.slope)
        return (torch.unflatten(swish, -1, groups) * inverse).flatten(-2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


def _default_groups(width: int) -> int:
    fitting = [n for n in range(1, _MOST_GROUPS + 1) if width % n == 0 and width // n >= _LEAST_WIDTH]
    return max(fitting, default=1)
