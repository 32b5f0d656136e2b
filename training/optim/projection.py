"""Normalize and project: weights that a norm makes scale-invariant keep the size they started with."""

import torch
from torch import nn

from masknet.blocks import InstanceGuidedMask, MaskBlock


class Projection:
    """After every step, W ← W · ‖W₀‖ / ‖W‖ for each block's W, and for each mask's last layer with its bias together.

    NaP (Lyle et al., arXiv 2407.01800). Before a norm that does not see a factor, the size of these weights changes
    nothing but the effective learning rate, which falls as they grow; projection keeps it. Of a mask's last layer only
    weight and bias together are free of scale. The norms' affines are left alone (what the authors do with them is not
    known here). Holds but for the norm's eps.
    """

    def __init__(self, network: nn.Module) -> None:
        blocks = [block for block in network.modules() if isinstance(block, MaskBlock)]
        masks = [block.mask.project for block in blocks if isinstance(block.mask, InstanceGuidedMask)]
        self._sets: list[list[torch.Tensor]] = [[block.linear.weight] for block in blocks]
        self._sets += [[mask.weight, mask.bias] for mask in masks]
        self._sizes = [_size(members) for members in self._sets]

    @torch.no_grad()
    def __call__(self) -> None:
        """Bring every set of weights back to its first size."""
        for members, size in zip(self._sets, self._sizes, strict=True):
            factor = size / _size(members).clamp(min=torch.finfo(size.dtype).tiny)
            for member in members:
                member.mul_(factor)


def _size(members: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([member.detach().square().sum() for member in members]).sum().sqrt()
