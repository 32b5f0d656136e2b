"""Folding of a residual block: the stream is read twice, so what it is owed cannot move on."""

import copy

import torch

from masknet.blocks import InstanceGuidedMask, effective_weight
from masknet.folding.algebra import Matrix
from masknet.folding.blocks import FoldedBlock, FoldedResidual
from masknet.folding.building import Builder, activation_name, at_masks, name, packed
from masknet.folding.norms import FoldedNorm
from masknet.norms.base import Affine, Norm
from masknet.norms.none import NoNorm
from masknet.residual import ResidualBlock


def fold_residual(build: Builder, place: str, block: ResidualBlock) -> FoldedResidual:
    """R + branch(R) with the norm before the branch folded into the mask, and what is positive into W."""
    masked = isinstance(block.mask, InstanceGuidedMask)
    norm_in, owed = _norm_in(build, place, block, masked)
    second = build.second(block.mask, owed, wide=False)
    reader = build.read(block.mask.aggregate) if isinstance(block.mask, InstanceGuidedMask) else 0
    matrix = Matrix(effective_weight(block.linear).detach(), None)
    if not masked and owed is not None:
        matrix.take_inputs(owed)
    activation = activation_name(block.activation)
    norm_out, scale = _norm_out(build, place, block, matrix, activation == "relu")
    branch = FoldedBlock(second, reader, packed(matrix), FoldedNorm(None, None, overwrite=True), activation)
    return FoldedResidual(norm_in, branch, norm_out, scale, _norm_after(build, place, block.norm_after))


def _norm_in(build: Builder, place: str, block: ResidualBlock, masked: bool) -> tuple[FoldedNorm, Affine | None]:
    norm = block.norm_in
    if isinstance(norm, NoNorm):
        return FoldedNorm(None, None), None
    affine = norm.separated()
    if affine is None:
        factor = torch.full_like(block.linear.weight[0], block.input_scale)
        return build.unfolded(place, norm), Affine(factor, torch.zeros_like(factor))
    affine = Affine(affine.scale * block.input_scale, affine.shift * block.input_scale)
    owed, left = at_masks(affine) if masked else (affine, None)
    core = None if norm.fold() is not None else copy.deepcopy(norm)
    build.notes.folded(place, f"{name(norm)} before the branch: γ into {'the mask' if masked else 'W'}")
    if core is not None:
        build.notes.kept(place, f"{name(norm)} before the branch: looks at every row")
    return FoldedNorm(core, left), owed


def _norm_out(build: Builder, place: str, block: ResidualBlock, matrix: Matrix, relu: bool) -> tuple[FoldedNorm, float]:
    """What is left of the norm behind the activation, and of the branch's factor."""
    norm, factor = block.norm_out, block.branch_scale
    affine = norm.separated()
    if affine is None:
        return build.unfolded(place, norm), factor
    affine = Affine(affine.scale.to(matrix.weight) * factor, affine.shift.to(matrix.weight) * factor)
    if norm.fold() is None:
        build.notes.kept(place, f"{name(norm)} behind the activation: looks at every row")
        return FoldedNorm(copy.deepcopy(norm), affine), 1.0
    if relu and bool((affine.scale > 0).all()):
        matrix.scale_outputs(affine.scale)
        if not isinstance(norm, NoNorm):
            build.notes.folded(place, f"{name(norm)} behind the ReLU: its positive scale into W")
        affine = Affine(torch.ones_like(affine.scale), affine.shift)
    elif not isinstance(norm, NoNorm):
        build.notes.kept(place, f"{name(norm)} behind the activation: an affine, whose scale cannot pass it")
    return FoldedNorm(None, affine), 1.0


def _norm_after(build: Builder, place: str, norm: Norm) -> FoldedNorm:
    if isinstance(norm, NoNorm):
        return FoldedNorm(None, None)
    affine = norm.separated()
    if affine is None:
        return build.unfolded(place, norm)
    build.notes.kept(place, f"{name(norm)} of the stream: read by the next branch and the next sum")
    return FoldedNorm(None if norm.fold() is not None else copy.deepcopy(norm), affine, overwrite=True)
