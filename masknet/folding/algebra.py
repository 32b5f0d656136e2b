"""Where an affine can go without changing what a network computes.

A stream x that is owed an affine stands for scale ⊙ x + shift. Legend: z width of the stream, h of what reads it.
"""

from dataclasses import dataclass

import torch

from masknet.norms.base import Affine

_LARGEST = 1e4  # of a shift over its scale: beyond it half precision would overflow


@dataclass
class Matrix:
    """y = weight · x + bias, being rewritten; weight [h, z], bias [h]."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def scale_outputs(self, scale_h: torch.Tensor) -> None:
        """diag(scale) · y."""
        self.weight = scale_h.unsqueeze(1) * self.weight
        self.bias = None if self.bias is None else scale_h * self.bias

    def shift_outputs(self, shift_h: torch.Tensor) -> None:
        """y + shift."""
        self.bias = shift_h if self.bias is None else self.bias + shift_h

    def centre_outputs(self) -> None:
        """y − mean(y)."""
        self.weight = self.weight - self.weight.mean(0, keepdim=True)
        self.bias = None if self.bias is None else self.bias - self.bias.mean()

    def take_inputs(self, owed: Affine) -> None:
        """Read x where it read scale ⊙ x + shift."""
        if bool(owed.shift.any()):
            self.shift_outputs(self.weight @ owed.shift)
        self.weight = self.weight * owed.scale


def beside_a_mask(owed: Affine) -> tuple[torch.Tensor, Affine]:
    """m ⊙ (γ ⊙ x + β) = (s ⊙ m) ⊙ (p ⊙ x + q): s for the mask's last layer, and p and q.

    s is γ, p is 1 and q is β / γ wherever γ is not 0; there s is 1 and p and q are γ and β. Rounding is as before: an
    error of ε |β / γ| in the sum becomes ε |β| by s.
    """
    ratio = owed.shift / owed.scale
    moves = (owed.scale != 0) & (ratio.abs() <= _LARGEST)
    one = torch.ones_like(owed.scale)
    left = Affine(torch.where(moves, one, owed.scale), torch.where(moves, ratio, owed.shift))
    return torch.where(moves, owed.scale, one), left


@dataclass(frozen=True)
class PastReLU:
    """relu(γ ⊙ x + β) = |γ| ⊙ relu(sign ⊙ x + shift), owed being |γ|; a channel of γ = 0 is owed relu(β) alone."""

    sign: torch.Tensor
    shift: torch.Tensor
    owed: Affine


def past_relu(affine: Affine) -> PastReLU | None:
    """The affine before a ReLU behind it; None where a shift would become too large."""
    silent = affine.scale == 0
    size = affine.scale.abs()
    shift = torch.where(silent, 0, affine.shift / torch.where(silent, 1, size))
    if bool((shift.abs() > _LARGEST).any()):
        return None
    sign = torch.where(affine.scale < 0, -torch.ones_like(size), torch.ones_like(size))
    return PastReLU(sign, shift, Affine(size, torch.where(silent, affine.shift.clamp(min=0), 0)))
