"""Folding: a trained network rewritten so that what its norms do at no row's expense costs nothing."""

import copy

import torch
from torch import nn

from masknet.blocks import MaskBlock, effective_weight
from masknet.networks import ParallelMaskNet, SerialMaskNet
from masknet.norms.affine import AffineOnly
from masknet.norms.base import Affine, Norm
from masknet.norms.none import NoNorm

Network = SerialMaskNet | ParallelMaskNet


def fold_affines(network: Network) -> Network:
    """A copy for evaluation in which norms that are affines by now (`Norm.fold`) are gone.

    Behind a block's W such a norm becomes its scale, diag(s) · W, and a bias; weight standardization becomes the matrix
    that it makes. Of LN_EMB a scale and a shift are left. Other norms stay, and so do those of residual branches, which
    have no W before them. Equal to the network but for rounding.
    """
    folded = copy.deepcopy(network).eval()
    for block in folded.blocks:
        if isinstance(block, MaskBlock):
            _fold_block(block)
    affine = folded.embedding_norm.fold()
    if affine is not None and not isinstance(folded.embedding_norm, NoNorm):
        folded.embedding_norm = as_module(affine, folded.embedding_norm)
    return folded


def as_module(affine: Affine, norm: Norm) -> AffineOnly:
    """An affine as a norm of its own."""
    module = AffineOnly(norm.shape, eps=norm.eps).to(affine.scale)
    module.load_state_dict({"weight": affine.scale, "bias": affine.shift})
    return module


@torch.no_grad()
def _fold_block(block: MaskBlock) -> None:
    linear = block.linear
    weight = effective_weight(linear)
    affine = None if isinstance(block.norm, NoNorm) else block.norm.fold()
    static = nn.Linear(linear.in_features, linear.out_features, bias=affine is not None).to(weight)
    static.weight.copy_(weight if affine is None else affine.scale.unsqueeze(1) * weight)
    if affine is not None:
        static.bias.copy_(affine.shift)
        block.norm = NoNorm(block.norm.shape, eps=block.norm.eps)
    block.linear = static
