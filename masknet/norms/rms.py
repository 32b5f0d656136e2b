"""Root-mean-square normalization."""

import torch
from torch.nn import functional

from masknet.norms.base import RowNorm


class RMSNorm(RowNorm):
    """y = γ ⊙ x / √(mean(x²) + eps) over the last axis (Zhang and Sennrich, arXiv 1910.07467).

    Differs from torch.nn.RMSNorm as `LayerNorm` here does from torch's; eps is never left to torch, whose own
    depends on its version. Statistics are computed in fp32 or wider.
    """

    kind = "rms"
    biased = False
    scale_invariant = True

    def core(self, x: torch.Tensor) -> torch.Tensor:
        """x over its root mean square."""
        return functional.rms_norm(x, self.shape[-1:], eps=self.eps)
