"""Steps to which numbers are rounded, so that bytes stand for them.

Legend: N rows, Z inputs and O outputs of a layer.
"""

from typing import Self

import torch
from torch import nn

_RARE = 0.1  # of the largest bound: the least one, for columns that are livelier in service than they were in the rows
_UNUSED = 1e-3  # of the largest weight, likewise


class Grid(nn.Module):
    """The steps to which a layer's input is rounded: byte = x / (smooth · scale) + zero.

    Args:
        smooth_Z: what columns are divided by, and weights multiplied with.
        scale: width of a step.
        zero: the byte of 0.
    """

    smooth_Z: torch.Tensor
    factor_Z: torch.Tensor

    def __init__(self, smooth_Z: torch.Tensor, scale: float, zero: int) -> None:
        super().__init__()
        self.register_buffer("smooth_Z", smooth_Z)
        self.register_buffer("factor_Z", 1 / (smooth_Z * scale))
        self.scale, self.zero = scale, zero

    @classmethod
    def of(cls, range_2Z: torch.Tensor, weight_OZ: torch.Tensor) -> Self:
        """For inputs between bounds, and the weights that they meet."""
        largest_Z = range_2Z.abs().amax(0)
        heaviest_Z = weight_OZ.abs().amax(0)
        smooth_Z = (_floored(largest_Z, _RARE) / _floored(heaviest_Z, _UNUSED)).sqrt()
        zero = 128 if bool((range_2Z[0] < 0).any()) else 0
        return cls(smooth_Z, float((largest_Z / smooth_Z).max().clamp(min=1e-30)) / (127 if zero else 255), zero)

    def forward(self, x_NZ: torch.Tensor) -> torch.Tensor:
        """Bytes [N, Z]."""
        return self.of_steps(x_NZ * self.factor_Z)

    def of_steps(self, steps_NZ: torch.Tensor) -> torch.Tensor:
        """Bytes [N, Z] of what counts in steps already, and is written over.

        Conversion to int8 is five times as fast as to uint8, which is 128 more: another first bit.
        """
        if self.zero != 128:
            steps_NZ.add_(self.zero - 128)
        return steps_NZ.round_().clamp_(-128, 127).to(torch.int8).view(torch.uint8).bitwise_xor_(128)

    def part(self, start: int, end: int) -> "Grid":
        """The same of some columns."""
        return Grid(self.smooth_Z[start:end], self.scale, self.zero)


def _floored(values_Z: torch.Tensor, share: float) -> torch.Tensor:
    return values_Z.clamp(min=max(share * float(values_Z.max()), 1e-12))


def steps_of(weight_OZ: torch.Tensor) -> torch.Tensor:
    """Width [O] of the steps of each output's weights."""
    return (weight_OZ.abs().amax(1) / 127).clamp(min=1e-30)
