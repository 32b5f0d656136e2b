"""The folded network: one request's context and its candidates → logits.

Legend: N candidates, C width of the context's embeddings, R of a candidate's, D = C + R, K blocks, h block width.
"""

from collections.abc import Sequence

import torch
from torch import nn

from masknet.folding.blocks import EmbeddingNorm, FirstLayers, FoldedBlock, FoldedResidual, Hidden
from masknet.folding.explanation import Explanation
from masknet.folding.grouped import grouped
from masknet.folding.norms import FoldedNorm, activated
from masknet.folding.packed import PackedLinear


class ParallelBody(nn.Module):
    """Blocks side by side, an MLP and a logit.

    Args:
        blocks: K of them.
        head: linear layers, the last of them the logit.
        activation: behind all but the last.
    """

    def __init__(self, blocks: Sequence[FoldedBlock], head: Sequence[PackedLinear], activation: str) -> None:
        super().__init__()
        self.blocks, self.head, self.activation = nn.ModuleList(blocks), nn.ModuleList(head), activation
        self.grouped = grouped(blocks)

    def forward(self, x_ND: torch.Tensor, hidden: Hidden) -> torch.Tensor:
        """Logits [N]."""
        together = None if self.grouped is None else self.grouped.takes(x_ND, hidden)
        if self.grouped is None or together is None:
            out = torch.cat([block(x_ND, hidden) for block in self.blocks], dim=1)
        elif together == "kernels":
            out = self.grouped.by_kernels(x_ND, hidden)
        else:
            out = self.grouped.batched(self.blocks, x_ND, hidden)
        *layers, logit = self.head
        for layer in layers:
            out = layer(out, "relu") if self.activation == "relu" else activated(layer(out), self.activation)
        logit_N: torch.Tensor = logit(out).squeeze(1)
        return logit_N


class SerialBody(nn.Module):
    """Blocks in a row, with or without residuals, a last norm and a logit."""

    def __init__(
        self, blocks: Sequence[FoldedBlock | FoldedResidual], final_norm: FoldedNorm, logit: PackedLinear
    ) -> None:
        super().__init__()
        self.blocks, self.final_norm, self.logit = nn.ModuleList(blocks), final_norm, logit

    def forward(self, x_Nz: torch.Tensor, hidden: Hidden) -> torch.Tensor:
        """Logits [N]."""
        for block in self.blocks:
            x_Nz = block(x_Nz, hidden)
        logit_N: torch.Tensor = self.logit(self.final_norm(x_Nz, hidden.parts)).squeeze(1)
        return logit_N


class ServingNetwork(nn.Module):
    """A network for inference, which `masknet.folding.fold` makes: equal to a trained one but for rounding.

    Args:
        first: all layers that read the raw embedding; None if nothing does.
        context_norm: what is left of LN_EMB for the fields of the context; None where `candidate_norm` does them too,
            once for each candidate, since what is left looks at the whole row.
        candidate_norm: what is left for the fields of a candidate.
        body: blocks and what stands on them.
        fields: places of the context's fields in the trained network's F, and of a candidate's.
        explanation: what was folded.
    """

    def __init__(
        self,
        first: FirstLayers | None,
        context_norm: EmbeddingNorm | None,
        candidate_norm: EmbeddingNorm,
        body: ParallelBody | SerialBody,
        fields: tuple[tuple[int, ...], tuple[int, ...]],
        explanation: Explanation,
    ) -> None:
        super().__init__()
        self.first, self.body = first, body
        self.context_norm, self.candidate_norm = context_norm, candidate_norm
        self.context_fields, self.candidate_fields = fields
        self.explanation = explanation
        self.context_width, self.candidate_width = (candidate_norm.dim * len(part) for part in fields)

    def forward(
        self, context_1C: torch.Tensor, candidates_NR: torch.Tensor, normed_NR: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [N].

        Args:
            context_1C: raw embeddings of the fields `context_fields`; [1, 0] if there are none.
            candidates_NR: raw embeddings of the fields `candidate_fields`.
            normed_NR: what `candidate_norm` makes of those, if it is at hand.

        Raises:
            ValueError: a width is wrong, or there is more than one context.
            RuntimeError: a gradient is asked for.
        """
        self._check(context_1C, candidates_NR)
        given = (context_1C, candidates_NR, normed_NR)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
            raise RuntimeError("a folded network is for inference and gives no gradients: use the trained one")
        hidden = Hidden() if self.first is None else self.first(context_1C, candidates_NR)
        logit_N: torch.Tensor = self.body(self._normed(context_1C, candidates_NR, normed_NR, hidden), hidden)
        return logit_N

    def explain(self) -> str:
        """What was folded and what remained, block by block, and why."""
        return str(self.explanation)

    def _normed(
        self,
        context_1C: torch.Tensor,
        candidates_NR: torch.Tensor,
        normed_NR: torch.Tensor | None,
        hidden: Hidden,
    ) -> torch.Tensor:
        rows = candidates_NR.shape[0]
        if self.context_norm is None:
            whole: torch.Tensor = self.candidate_norm(
                torch.cat([context_1C.expand(rows, -1), candidates_NR], 1), hidden
            )
            return whole
        if normed_NR is None:
            normed_NR = self.candidate_norm(candidates_NR, hidden)
        if not self.context_fields:
            return normed_NR
        return torch.cat([self.context_norm(context_1C, hidden).expand(rows, -1), normed_NR], 1)

    def _check(self, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> None:
        if tuple(context_1C.shape) != (1, self.context_width):
            raise ValueError(f"the context must be [1, {self.context_width}], not {list(context_1C.shape)}")
        if candidates_NR.dim() != 2 or candidates_NR.shape[1] != self.candidate_width:
            raise ValueError(f"candidates must be [N, {self.candidate_width}], not {list(candidates_NR.shape)}")
