"""Layer normalization."""

import torch
from torch import nn
from torch.nn import functional


class LayerNorm(nn.Module):
    """y = γ ⊙ (x − mean(x)) / √(var(x) + eps) + β over the last axis, biased variance (Ba et al., arXiv 1607.06450).

    Differs from torch.nn.LayerNorm in that only the last axis is normalized while the affine spans all of `shape`: with
    (F, d) one operation does the work of F separate layers. Statistics are computed in fp32 or wider.
    """

    def __init__(self, shape: tuple[int, ...], *, eps: float) -> None:
        super().__init__()
        self.shape, self.eps = shape, eps
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: torch.Tensor, instance: torch.Tensor | None = None) -> torch.Tensor:
        """Normalize x [..., *shape]; `instance` is for norms that condition on the raw embedding."""
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        normed = functional.layer_norm(wide, self.shape[-1:], eps=self.eps)
        return (normed * self.weight + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.shape}, eps={self.eps}"
