"""What a training step computes."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from features.batches import Batch
from masknet.model import MaskNet
from training.embeddings.prior import EmbeddingPrior
from training.fit.precision import Precision, computing


class StepOutput(NamedTuple):
    """One rank's share of a step: its part of the mean loss, and logits and labels for the statistics."""

    loss: torch.Tensor
    logit_B: torch.Tensor
    label_B: torch.Tensor


class ClickTask(nn.Module):
    """Weighted binary cross-entropy of a model's logits, in the form TorchRec's training pipeline expects.

    Args:
        model: gives embeddings and logits.
        precision: of the network.
        device_type: "cpu" or "cuda".
        embedding_l2: λ of a penalty λ/2 · ‖embeddings‖² that every row's loss has besides.
        prior: a further penalty of every row.
        embedding_dropout: share p of a row's fields whose embedding the network sees as 0 in training, and those of the
            others as 1 / (1 − p) times what they are.
    """

    def __init__(
        self,
        model: MaskNet,
        precision: Precision,
        device_type: str,
        *,
        embedding_l2: float = 0.0,
        prior: EmbeddingPrior | None = None,
        embedding_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.dropout = nn.Dropout1d(embedding_dropout)  # of whole "channels", which here are fields
        self._precision: Precision = precision
        self._device_type = device_type
        self._embedding_l2, self.prior = embedding_l2, prior

    def forward(self, batch: Batch) -> tuple[torch.Tensor, StepOutput]:
        """The loss to minimize, Σ weight · loss over this rank's rows, and what to report: losses without penalty."""
        with computing(self._precision, self._device_type):
            emb_BFD = self.model.embed(batch.ids, batch.values_BV, batch.missing_BV)
            logit_B = self.model.network(self.dropout(emb_BFD)).float()
        loss_B = functional.binary_cross_entropy_with_logits(logit_B, batch.label_B, reduction="none")
        loss = (loss_B * batch.weight_B).sum()
        output = StepOutput(loss.detach(), logit_B.detach(), batch.label_B)
        if self._embedding_l2:
            loss = loss + self._embedding_l2 / 2 * (emb_BFD.square().sum((1, 2)) * batch.weight_B).sum()
        if self.prior is not None:
            loss = loss + (self.prior(batch.ids, emb_BFD) * batch.weight_B).sum()
        return loss, output
