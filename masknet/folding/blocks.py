"""The parts of a folded network.

Legend: N candidates, F fields, d embedding width, C width of the context's embeddings, R of a candidate's, D = C + R,
T units of all first layers that read the raw embedding, z width of what is masked, h block width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from masknet.folding.norms import FoldedNorm
from masknet.folding.packed import PackedLinear


@dataclass(frozen=True)
class Hidden:
    """Outputs of the first layers: each reader's [N, T_i], and all in one [N, T] where they were computed so."""

    parts: Sequence[torch.Tensor] = ()
    whole_NT: torch.Tensor | None = None


class FirstLayers(nn.Module):
    """relu(U V + b) of everything that reads the raw embedding V = [context, candidate]: one matrix, split by columns.

    Args:
        weights: U of each reader, [T_i, D].
        biases: b of each, [T_i].
        context_width: C.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], context_width: int) -> None:
        super().__init__()
        self.sizes = [len(weight) for weight in weights]
        weight_TD, bias_T = torch.cat(list(weights)), torch.cat(list(biases))
        self.whole = PackedLinear(weight_TD, bias_T)
        self.context = PackedLinear(weight_TD[:, :context_width], bias_T)
        self.candidates = PackedLinear(weight_TD[:, context_width:], None)
        parts = torch.split(self.candidates.weight, self.sizes)
        self.parts = nn.ModuleList(PackedLinear(part, None) for part in parts)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Everything stays a view of one matrix, wherever it is moved to."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        width = self.context.weight.shape[1]
        self.context.weight, self.candidates.weight = self.whole.weight[:, :width], self.whole.weight[:, width:]
        for part, weight in zip(self.parts, torch.split(self.candidates.weight, self.sizes), strict=True):
            part.weight = weight
        self.context.bias = self.whole.bias
        return self

    def forward(self, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> Hidden:
        """Hidden units of all readers."""
        if candidates_NR.shape[0] == 1:  # all time goes into reading the weights, which is best done in one go
            hidden_1T: torch.Tensor = self.whole(torch.cat([context_1C, candidates_NR], 1), "relu")
            return Hidden(torch.split(hidden_1T, self.sizes, dim=1), hidden_1T)
        bias_T = self.context(context_1C)[0]
        if self.candidates.uses_onednn(candidates_NR):
            # A GEMM for each: the next layer reads whole rows a third faster than slices of rows.
            biases = torch.split(bias_T, self.sizes)
            parts = zip(self.parts, biases, strict=True)
            return Hidden([part(candidates_NR, "relu", bias=bias) for part, bias in parts])
        hidden_NT: torch.Tensor = self.candidates(candidates_NR, "relu", bias=bias_T)
        return Hidden(torch.split(hidden_NT, self.sizes, dim=1), hidden_NT)


class FoldedBlock(nn.Module):
    """activation(norm(W (m ⊙ x) + b)), or m ⊙ x where there is no W.

    Args:
        second: the mask's second layer; None for no mask.
        reader: place of the mask's first layer among the first layers.
        linear: W and b, or None.
        norm: what is left of the norm before the activation.
        activation: "none" or a name in `ACTIVATIONS`.
    """

    def __init__(
        self,
        second: PackedLinear | None,
        reader: int,
        linear: PackedLinear | None,
        norm: FoldedNorm,
        activation: str,
    ) -> None:
        super().__init__()
        self.second, self.reader, self.linear, self.norm, self.activation = second, reader, linear, norm, activation

    def forward(self, x_Nz: torch.Tensor, hidden: Hidden) -> torch.Tensor:
        """Output [N, h] for x [N, z], which is not written to."""
        second, linear, norm, activation = self.second, self.linear, self.norm, self.activation
        masked_Nz = x_Nz if second is None else second(hidden.parts[self.reader], times=x_Nz)
        if linear is None:
            return masked_Nz
        if norm.trivial and activation in ("none", "relu"):
            return linear(masked_Nz, activation)
        return norm(linear(masked_Nz), hidden.parts, activation)

    def behind_product(self, z_Nh: torch.Tensor, hidden: Hidden) -> torch.Tensor:
        """Output [N, h] for z = W (m ⊙ x) + b, which may be written to."""
        if self.norm.trivial and self.activation in ("none", "relu"):
            return z_Nh.relu_() if self.activation == "relu" else z_Nh
        return self.norm(z_Nh, hidden.parts, self.activation)


class FoldedResidual(nn.Module):
    """R + scale · norm_out(branch), normed once more where the placement says so.

    Args:
        norm_in: what is left of the norm before the branch.
        branch: the block.
        norm_out: what is left behind its activation.
        scale: of the branch, as far as it was not folded.
        norm_after: what is left of the norm of the sum.
    """

    def __init__(
        self, norm_in: FoldedNorm, branch: FoldedBlock, norm_out: FoldedNorm, scale: float, norm_after: FoldedNorm
    ) -> None:
        super().__init__()
        self.norm_in, self.branch, self.norm_out, self.norm_after = norm_in, branch, norm_out, norm_after
        self.scale = scale

    def forward(self, stream_Nh: torch.Tensor, hidden: Hidden) -> torch.Tensor:
        """The next residual stream [N, h]."""
        branch_Nh = self.norm_out(self.branch(self.norm_in(stream_Nh, hidden.parts), hidden), hidden.parts)
        return self.norm_after(torch.add(stream_Nh, branch_Nh, alpha=self.scale), hidden.parts)


class EmbeddingNorm(nn.Module):
    """What is left of LN_EMB for some of the fields, [N, f·d] → [N, f·d]."""

    def __init__(self, norm: FoldedNorm, dim: int) -> None:
        super().__init__()
        self.norm, self.dim = norm, dim

    def forward(self, emb_ND: torch.Tensor, hidden: Hidden) -> torch.Tensor:
        """The normalized embeddings, the input itself where nothing is left."""
        if self.norm.trivial:
            return emb_ND
        return self.norm(torch.unflatten(emb_ND, 1, (-1, self.dim)), hidden.parts).flatten(1)

    def select(self, fields: Sequence[int]) -> "EmbeddingNorm":
        """The same of some of the fields, by their places; none of a norm that looks at the whole row."""
        return EmbeddingNorm(self.norm.select(fields), self.dim)
