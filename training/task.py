"""What a training step computes."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from features.batches import Batch
from masknet.model import MaskNet


class StepOutput(NamedTuple):
    """One rank's share of a step: its part of the mean loss, and logits and labels for the statistics."""

    loss: torch.Tensor
    logit_B: torch.Tensor
    label_B: torch.Tensor


class ClickTask(nn.Module):
    """Weighted binary cross-entropy of a model's logits, in the form TorchRec's training pipeline expects."""

    def __init__(self, model: MaskNet, precision: str, device_type: str) -> None:
        super().__init__()
        self.model = model
        self._bf16 = precision == "bf16"
        self._device_type = device_type

    def forward(self, batch: Batch) -> tuple[torch.Tensor, StepOutput]:
        """The loss to minimize, Σ weight · loss over this rank's rows, and what to report."""
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._bf16):
            logit_B = self.model(batch.ids, batch.values_BV, batch.missing_BV)
        loss_B = functional.binary_cross_entropy_with_logits(logit_B, batch.label_B, reduction="none")
        loss = (loss_B * batch.weight_B).sum()
        return loss, StepOutput(loss.detach(), logit_B.detach(), batch.label_B)
