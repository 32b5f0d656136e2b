"""LN_EMB for some of the fields only, so that the context's and the candidates' can be normalized apart."""

import copy
from collections.abc import Sequence

import torch

from masknet.networks import PartialNorm
from masknet.norms.base import Norm
from masknet.norms.layer import ConditionalLayerNorm
from masknet.norms.none import NoNorm


def select_fields(norm: Norm, fields: Sequence[int]) -> Norm:
    """The norm of the fields at those places of [B, F, d], in that order, for evaluation.

    Args:
        norm: of a shape (F, d).
        fields: places in F; none is taken twice.
    """
    if isinstance(norm, PartialNorm):
        places = {int(field): place for place, field in enumerate(norm.fields)}
        normed = [i for i, field in enumerate(fields) if field in places]
        inner = select_fields(norm.norm, [places[fields[i]] for i in normed])
        if len(normed) == len(fields):
            return inner
        return PartialNorm(inner, normed, len(fields)) if normed else NoNorm((len(fields), norm.shape[1]), eps=norm.eps)
    chosen = copy.deepcopy(norm)
    index = torch.tensor(list(fields), dtype=torch.int64)
    if isinstance(chosen, ConditionalLayerNorm):
        _select_outputs(chosen, index)
    for module in chosen.modules():
        if isinstance(module, Norm):
            _select_entries(module, index)
    return chosen


@torch.no_grad()
def _select_entries(norm: Norm, index: torch.Tensor) -> None:
    """Parameters and statistics are […, F, d] or […, F, 1]."""
    num_fields = norm.shape[0]
    norm.shape = (len(index), norm.shape[1])
    for tensor in (*norm.parameters(recurse=False), *norm.buffers(recurse=False)):
        if tensor.dim() >= 2 and tensor.shape[-2] == num_fields:
            tensor.data = tensor.index_select(-2, index)


@torch.no_grad()
def _select_outputs(norm: ConditionalLayerNorm, index: torch.Tensor) -> None:
    """The second layer puts out 2 · F · d deltas."""
    for tensor in (norm.project.weight, norm.project.bias):
        tensor.data = torch.unflatten(tensor, 0, (2, *norm.shape)).index_select(1, index).flatten(0, 2)
