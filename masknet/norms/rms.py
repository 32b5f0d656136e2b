"""Root-mean-square normalization."""

import torch
from torch import nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """y = γ ⊙ x / √(mean(x²) + eps) over the last axis (Zhang and Sennrich, arXiv 1910.07467).

    Differs from torch.nn.RMSNorm as `LayerNorm` here does from torch's; eps has no default, since torch's own
    depends on its version. Statistics are computed in fp32 or wider.
    """

    def __init__(self, shape: tuple[int, ...], *, eps: float) -> None:
        super().__init__()
        self.shape, self.eps = shape, eps
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: torch.Tensor, instance: torch.Tensor | None = None) -> torch.Tensor:
        """Normalize x [..., *shape]; `instance` is not looked at."""
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return (functional.rms_norm(wide, self.shape[-1:], eps=self.eps) * self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.shape}, eps={self.eps}"
