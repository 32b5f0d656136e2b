"""No normalization: the baseline of every comparison."""

import torch

from masknet.norms.base import Affine, Norm


class NoNorm(Norm):
    """y = x. Takes the other norms' arguments, so that the slot can be switched off by name."""

    def forward(self, x: torch.Tensor, instance: torch.Tensor | None = None) -> torch.Tensor:
        """x, unchanged."""
        return x

    def fold(self) -> Affine:
        return Affine(torch.ones(self.shape), torch.zeros(self.shape))
