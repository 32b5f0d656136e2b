"""The parts of a MaskNet (arXiv 2102.07619, section 3).

Legend: B rows, F fields, d embedding width, D = F·d, z width of what is masked, t aggregation width of the mask = r·z,
h block width.
"""

import math

import torch
from torch import nn

from masknet.activations import ACTIVATIONS, initialize, make_dropout
from masknet.kernels.dispatch import PendingNorm, masked, norm_act
from masknet.kernels.products import Linear, linear, relu
from masknet.norms.base import Norm


class InstanceGuidedMask(nn.Module):
    """m = W2 · relu(W1 · V + b1) + b2: weights for what is masked, computed from the raw embedding V [B, D]."""

    def __init__(self, embedding_width: int, masked_width: int, reduction_ratio: float) -> None:
        super().__init__()
        aggregation_width = int(reduction_ratio * masked_width)
        if aggregation_width < 1:
            raise ValueError(
                f"reduction_ratio {reduction_ratio} leaves no aggregation unit for a width of {masked_width}"
            )
        self.aggregate = Linear(embedding_width, aggregation_width)
        self.project = Linear(aggregation_width, masked_width)

    def forward(self, raw_BD: torch.Tensor) -> torch.Tensor:
        """Mask [B, z]."""
        mask_Bz: torch.Tensor = self.project(relu(self.aggregate(raw_BD)))
        return mask_Bz


class NoMask(nn.Module):
    """A mask of ones: the ablation without masks."""

    def forward(self, raw_BD: torch.Tensor) -> torch.Tensor:
        """A 1 to multiply with."""
        return raw_BD.new_ones(())


class StandardizedLinear(nn.Linear):
    """A linear layer by W' = (W − mean) / (deviation + 1e-5) of each output's row over its inputs, unbiased deviation.

    Weight Standardization (Qiao et al., arXiv 1903.10520; joe-siyuan-qiao/WeightStandardization). A row of one weight,
    which has no deviation, becomes 0.
    """

    def standardized(self) -> torch.Tensor:
        """W' [outputs, inputs]."""
        centred = self.weight - self.weight.mean(1, keepdim=True)
        # vector_norm's gradient at 0 is 0, where a square root's is not finite
        norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
        deviation = norm / math.sqrt(max(1, self.in_features - 1))
        return centred / (deviation + 1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W' x."""
        return linear(x, self.standardized(), self.bias)


def effective_weight(linear: nn.Linear) -> torch.Tensor:
    """The matrix that a layer multiplies by: its own, or the standardized one."""
    return linear.standardized() if isinstance(linear, StandardizedLinear) else linear.weight


class MaskBlock(nn.Module):
    """relu(LN_HID(W (m ⊙ x))), W without bias, the norm before the non-linearity, then dropout.

    x is LN_EMB of the embedding or the output of another block; the mask m always reads the raw embedding.
    """

    def __init__(
        self,
        mask: nn.Module,
        input_width: int,
        width: int,
        norm: Norm,
        dropout: float,
        *,
        activation: str = "relu",
        weight_standardization: bool = False,
    ) -> None:
        super().__init__()
        self.mask = mask
        layer = StandardizedLinear if weight_standardization else Linear
        self.linear = initialize(layer(input_width, width, bias=False), activation)
        self.norm = norm
        self.activation = nn.Identity() if norm.replaces_activation else ACTIVATIONS[activation]()
        self.dropout = make_dropout(activation, dropout)

    def forward(self, x_Bz: torch.Tensor | PendingNorm, raw_BD: torch.Tensor) -> torch.Tensor:
        """Hidden vector [B, h]."""
        hidden_Bh = self.linear(masked(self.mask(raw_BD), x_Bz))
        return norm_act(self.norm, self.activation, self.dropout, hidden_Bh, raw_BD)


class MaskOnlyBlock(nn.Module):
    """m ⊙ x: the ablation without feed-forward layers."""

    def __init__(self, mask: nn.Module) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x_Bz: torch.Tensor | PendingNorm, raw_BD: torch.Tensor) -> torch.Tensor:
        """Masked vector [B, z]."""
        return masked(self.mask(raw_BD), x_Bz)
