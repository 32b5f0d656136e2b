"""L1 normalization."""

import torch
from torch import nn

from masknet.norms.base import Positive, RowNorm

GAUSSIAN = 0.7978845608028654  # √(2/π): mean absolute deviation over standard deviation of a normal distribution


class L1Norm(RowNorm):
    """y = γ ⊙ (x − mean(x)) / (mean|x − mean(x)| + eps) + β over the last axis (arXiv 2411.10948).

    No squares and no root, for integer hardware. Changed: γ starts at √(2/π) (`gain`), where a normal x gets what layer
    norm gives it; the paper's 1 gives 1.25 times that. eps is added to a deviation and not to a variance, so that its
    default here is 3e-3, about the root of the other norms' 1e-5.
    """

    kind = "l1"
    odd = False  # other signs, another mean
    default_eps = 3e-3
    scale_invariant = True

    def __init__(self, shape: tuple[int, ...], *, eps: float, gain: Positive = GAUSSIAN) -> None:
        super().__init__(shape, eps=eps)
        nn.init.constant_(self.weight, gain)

    def core(self, x: torch.Tensor) -> torch.Tensor:
        """x centred and over its mean absolute deviation."""
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.abs().mean(-1, keepdim=True) + self.eps)
