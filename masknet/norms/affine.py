"""A scale and a shift, without any statistics: what normalization removal leaves."""

import torch
from torch import nn

from masknet.norms.base import Affine, Formula, Norm


class AffineOnly(Norm):
    """y = γ ⊙ x + β, or γ ⊙ (x − mean(x)) + β where `centred`; takes eps like the other norms and has no use for it.

    This is a layer normalization whose divisor was frozen (Baroni et al., arXiv 2507.02559) and then folded into γ. A
    linear layer before it takes over the centring; where there is none, at LN_EMB, `centred` keeps it: a linear map.
    """

    def __init__(self, shape: tuple[int, ...], *, eps: float, centred: bool = False) -> None:
        super().__init__(shape, eps=eps)
        self.centred = centred
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def normalize(self, x: torch.Tensor, instance: torch.Tensor | None) -> torch.Tensor:
        """γ ⊙ x + β."""
        return torch.addcmul(self.bias, self.core(x), self.weight)

    def core(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def separated(self) -> Affine:
        return Affine(self.weight.detach(), self.bias.detach())

    def fold(self) -> Affine | None:
        return None if self.centred else self.separated()

    @property
    def has_formula(self) -> bool:
        return not self.centred

    def formula(self, x: torch.Tensor) -> Formula:
        return Formula("affine", self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.shape}, centred={self.centred}"
