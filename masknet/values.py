"""Embeddings of fields whose values are numbers and not ids."""

from dataclasses import dataclass

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedTensor

INIT_STD = 0.01  # of everything that stands for a field, unless another is given: of the rows of the tables too


@dataclass(frozen=True, kw_only=True)
class ValueField:
    """A field whose values are numbers; `normalize` sends its embedding through LN_EMB like those of ids.

    By default it does not: LN(x · v) keeps little of x but its sign.
    """

    name: str
    normalize: bool = False


class ValueEmbedding(nn.Module):
    """x · v + b + missing · u for each of V fields, with v, b and u [d] of the field's own; a missing x is 0.

    All three start as the rows of a table do, from N(0, std²). b does not start at 0, so that the direction of an
    embedding depends on the size of x and not on its sign alone, which is all that a normalization would leave.
    """

    def __init__(self, names: list[str], dim: int, std: float = INIT_STD) -> None:
        super().__init__()
        self.names, self.dim = names, dim
        self.scale = nn.Parameter(torch.empty(len(names), dim).normal_(0.0, std))
        self.bias = nn.Parameter(torch.empty(len(names), dim).normal_(0.0, std))
        self.missing = nn.Parameter(torch.empty(len(names), dim).normal_(0.0, std))

    def forward(self, values_BV: torch.Tensor, missing_BV: torch.Tensor) -> KeyedTensor:
        """Embeddings [B, V · d] by field, from values (0 where missing) and 1 where a value is missing, else 0."""
        emb_BVd = torch.addcmul(self.bias, values_BV.unsqueeze(-1), self.scale)
        emb_BVd = torch.addcmul(emb_BVd, missing_BV.unsqueeze(-1), self.missing)
        return KeyedTensor(self.names, [self.dim] * len(self.names), emb_BVd.flatten(1))
