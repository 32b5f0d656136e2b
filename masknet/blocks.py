"""The parts of a MaskNet (arXiv 2102.07619, section 3).

Legend: B rows, F fields, d embedding width, D = F·d, z width of what is masked, t aggregation width of the mask = r·z,
h block width.
"""

import torch
from torch import nn
from torch.nn import functional


class InstanceGuidedMask(nn.Module):
    """m = W2 · relu(W1 · V + b1) + b2: weights for what is masked, computed from the raw embedding V [B, D]."""

    def __init__(self, embedding_width: int, masked_width: int, reduction_ratio: float) -> None:
        super().__init__()
        aggregation_width = int(reduction_ratio * masked_width)
        if aggregation_width < 1:
            raise ValueError(
                f"reduction_ratio {reduction_ratio} leaves no aggregation unit for a width of {masked_width}"
            )
        self.aggregate = nn.Linear(embedding_width, aggregation_width)
        self.project = nn.Linear(aggregation_width, masked_width)

    def forward(self, raw_BD: torch.Tensor) -> torch.Tensor:
        """Mask [B, z]."""
        mask_Bz: torch.Tensor = self.project(functional.relu(self.aggregate(raw_BD)))
        return mask_Bz


class MaskBlock(nn.Module):
    """relu(LN_HID(W (m ⊙ x))), W without bias, the norm before the non-linearity, then dropout.

    x is LN_EMB of the embedding or the output of another block; the mask m always reads the raw embedding.
    """

    def __init__(self, mask: InstanceGuidedMask, input_width: int, width: int, norm: nn.Module, dropout: float) -> None:
        super().__init__()
        self.mask = mask
        self.linear = nn.Linear(input_width, width, bias=False)
        self.norm = norm
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_Bz: torch.Tensor, raw_BD: torch.Tensor) -> torch.Tensor:
        """Hidden vector [B, h]."""
        hidden_Bh = self.norm(self.linear(self.mask(raw_BD) * x_Bz), instance=raw_BD)
        out_Bh: torch.Tensor = self.dropout(functional.relu(hidden_Bh))
        return out_Bh
