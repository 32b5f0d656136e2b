"""Root-mean-square normalization."""

import torch
from torch import nn
from torch.nn import functional

from masknet.norms.base import Norm


class RMSNorm(Norm):
    """y = γ ⊙ x / √(mean(x²) + eps) over the last axis (Zhang and Sennrich, arXiv 1910.07467).

    Differs from torch.nn.RMSNorm as `LayerNorm` here does from torch's; eps is never left to torch, whose own
    depends on its version. Statistics are computed in fp32 or wider.
    """

    scale_invariant = True

    def __init__(self, shape: tuple[int, ...], *, eps: float) -> None:
        super().__init__(shape, eps=eps)
        self.weight = nn.Parameter(torch.ones(shape))

    def normalize(self, x: torch.Tensor, instance: torch.Tensor | None) -> torch.Tensor:
        """x over its root mean square."""
        return functional.rms_norm(x, self.shape[-1:], eps=self.eps) * self.weight
