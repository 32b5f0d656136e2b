"""Folding: a trained network rewritten for inference, exactly, so that what can be computed once is computed once.

The algebra is known piece by piece: batch norms into weights, layer norm's centring into the matrix before it (Jiang et
al., arXiv 2305.14858), scales past a ReLU. `ServingNetwork.explain` says what became of each part of a network.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from masknet.blocks import InstanceGuidedMask, MaskBlock, MaskOnlyBlock
from masknet.folding.blocks import EmbeddingNorm, FoldedBlock, FoldedResidual
from masknet.folding.building import Builder, activation_name, at_masks, name, packed, take
from masknet.folding.fields import select_fields
from masknet.folding.network import ParallelBody, SerialBody, ServingNetwork
from masknet.folding.norms import FoldedNorm, WholeNorm
from masknet.folding.residual import fold_residual
from masknet.networks import Network, ParallelMaskNet, PartialNorm, SerialMaskNet
from masknet.norms.base import Affine, Norm
from masknet.norms.layer import ConditionalLayerNorm
from masknet.norms.none import NoNorm
from masknet.residual import ResidualBlock

__all__ = ["ServingNetwork", "fold"]


@torch.inference_mode(False)  # for weights that can be loaded into, whatever mode this is called in
@torch.no_grad()
def fold(network: Network, context: Sequence[int] = ()) -> ServingNetwork:
    """The network for inference, on the device of `network`, which is left as it is; it may be moved to another.

    Args:
        network: a trained network; norms that anneal are folded as they are now.
        context: places in F of the fields that all candidates of a request share.

    Raises:
        ValueError: a place is not in F, is named twice, or no field is left for the candidates.
    """
    device = next(network.parameters()).device
    network = copy.deepcopy(network).cpu().eval()  # a rewrite is hundreds of small steps with a look at the outcome
    num_fields, dim = network.embedding_norm.shape
    fields = _split(context, num_fields)
    columns = torch.arange(num_fields * dim).view(num_fields, dim)[[*fields[0], *fields[1]]].flatten()
    build = Builder(columns, dim * len(fields[0]))
    norms, owed = _embedding_norms(build, network, fields)
    if isinstance(network, ParallelMaskNet):
        body: ParallelBody | SerialBody = _parallel(build, network, owed)
    else:
        body = _serial(build, network, owed)
    build.note_first_layers()
    folded = ServingNetwork(build.first_layers(), *norms, body, fields, build.notes)
    return folded.eval().requires_grad_(False).to(device)


def _split(context: Sequence[int], num_fields: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    unknown = [field for field in context if not 0 <= field < num_fields]
    if unknown or len(set(context)) < len(context):
        raise ValueError(f"context {list(context)}: each of the {num_fields} fields may be named once, as 0 to F − 1")
    candidates = tuple(field for field in range(num_fields) if field not in context)
    if not candidates:
        raise ValueError("all fields are the context's: nothing tells the candidates apart")
    return tuple(context), candidates


def _embedding_norms(
    build: Builder, network: Network, fields: tuple[tuple[int, ...], tuple[int, ...]]
) -> tuple[tuple[EmbeddingNorm | None, EmbeddingNorm], Affine | None]:
    """What is left of LN_EMB for the context and the candidates, and what its output is owed."""
    norm, place = network.embedding_norm, "LN_EMB"
    num_context, dim = len(fields[0]), norm.shape[1]
    whole = select_fields(norm, [*fields[0], *fields[1]])
    inner = whole.norm if isinstance(whole, PartialNorm) else whole
    if isinstance(inner, ConditionalLayerNorm):
        return (None, EmbeddingNorm(build.conditional(place, inner, whole), dim)), None
    if isinstance(inner, NoNorm):
        context_norm, candidate_norm = (EmbeddingNorm(FoldedNorm(None, None), dim) for _ in fields)
        return (context_norm, candidate_norm), None
    affine = whole.separated()
    parts = [select_fields(norm, part) for part in fields]
    if affine is None:
        build.notes.kept(place, f"{name(inner)}: its scale depends on the row")
        context_norm, candidate_norm = (EmbeddingNorm(WholeNorm(part), dim) for part in parts)
        return (context_norm, candidate_norm), None
    if whole.fold() is None:
        build.notes.kept(place, f"{name(inner)}: once for all blocks, and once per request for the context's fields")
    masked = isinstance(getattr(network.blocks[0], "mask", None), InstanceGuidedMask)
    owed, left = at_masks(affine) if masked else (affine, None)
    build.notes.folded(place, _where_the_affine_went(masked, left))
    cores = [None if whole.fold() is not None else part for part in parts]
    lefts = [None, None] if left is None else _cut(left, num_context)
    context_norm, candidate_norm = (
        EmbeddingNorm(FoldedNorm(core, each), dim) for core, each in zip(cores, lefts, strict=True)
    )
    return (context_norm, candidate_norm), _flat(owed)


def _where_the_affine_went(masked: bool, left: Affine | None) -> str:
    if left is None:
        return "γ and β: into W and its bias"
    stays = int((left.scale != 1).sum())
    text = "γ: into the masks' second layers" + (f", but for {stays} channels where it is 0" if stays else "")
    return text + ("; β over γ beside what is normalized" if bool(left.shift.any()) else "")


def _cut(affine: Affine, at: int) -> list[Affine | None]:
    return [Affine(affine.scale[part], affine.shift[part]) for part in (slice(0, at), slice(at, None))]


def _flat(affine: Affine | None) -> Affine | None:
    return None if affine is None else Affine(affine.scale.flatten(), affine.shift.flatten())


def _parallel(build: Builder, network: ParallelMaskNet, owed: Affine | None) -> ParallelBody:
    linears = [*(layer for layer in network.head if isinstance(layer, nn.Linear)), network.logit]
    blocks = [block for block in network.blocks if isinstance(block, MaskBlock | MaskOnlyBlock)]
    folded = [
        build.block(f"block {k}", block, owed, wide=True, moves="linear") for k, block in enumerate(blocks, start=1)
    ]
    inputs = torch.cat([_outputs(build, block) + k * _width(block, build) for k, block in enumerate(blocks)])
    first = packed(take(linears[0], inputs, [left for _, left in folded]))
    rest = [packed(take(linear, torch.arange(linear.in_features), [None])) for linear in linears[1:]]
    activation = activation_name(network.head[1]) if len(network.head) else "none"
    return ParallelBody([block for block, _ in folded], [first, *rest], activation)


def _width(block: nn.Module, build: Builder) -> int:
    return len(_outputs(build, block))


def _outputs(build: Builder, block: nn.Module) -> torch.Tensor:
    """Places that a block's outputs had before the context's columns went first: those of D where there is no W."""
    if isinstance(block, MaskOnlyBlock):
        return build.columns
    assert isinstance(block, MaskBlock | ResidualBlock)
    return torch.arange(block.linear.out_features)


def _serial(build: Builder, network: SerialMaskNet, owed: Affine | None) -> SerialBody:
    blocks: list[FoldedBlock | FoldedResidual] = []
    following = [*network.blocks[1:], network.logit]
    for k, (block, after) in enumerate(zip(network.blocks, following, strict=True), start=1):
        if isinstance(block, ResidualBlock):
            blocks.append(fold_residual(build, f"block {k}", block))
            continue
        assert isinstance(block, MaskBlock | MaskOnlyBlock)
        wide = k == 1 or isinstance(block, MaskOnlyBlock)
        folded, owed = build.block(f"block {k}", block, owed, wide=wide, moves=_moves(after))
        blocks.append(folded)
    final, owed = _final_norm(build, network.final_norm, owed)
    return SerialBody(blocks, final, packed(take(network.logit, _outputs(build, network.blocks[-1]), [owed])))


def _moves(after: nn.Module) -> str:
    if isinstance(after, MaskBlock):
        return "mask" if isinstance(after.mask, InstanceGuidedMask) else "linear"
    return "linear" if isinstance(after, nn.Linear) else ""


def _final_norm(build: Builder, norm: Norm, owed: Affine | None) -> tuple[FoldedNorm, Affine | None]:
    """The last norm of residual blocks; its γ and β go into the logit."""
    if isinstance(norm, NoNorm):
        return FoldedNorm(None, None), owed
    affine = norm.separated()
    if affine is None:
        return build.unfolded("final norm", norm), None
    build.notes.folded("final norm", f"{name(norm)}: γ and β into the logit")
    return FoldedNorm(None if norm.fold() is not None else norm, None), affine
