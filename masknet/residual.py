"""Serial MaskBlocks with residuals, to place normalizations as deep networks have them.

The paper's blocks have none of this; the forms are transformers' with a block's branch f(x) = activation(W (m ⊙ x)):

pre    R + f(N(R))
post   N(R + f(R))
peri   R + N(f(N(R)))                       (Kim et al., arXiv 2502.02732)
mix    the first quarter post, the rest pre (Li et al., arXiv 2412.13795)
none   R + f(R)

Where the last residual is not normalized itself (pre, peri, mix) there is a last norm before the logit.

Legend: B rows, D width of the raw embedding, h block width.
"""

import math

import torch
from torch import nn

from masknet.activations import ACTIVATIONS, initialize, make_dropout
from masknet.blocks import StandardizedLinear
from masknet.config import MaskNetConfig
from masknet.kernels.dispatch import normed
from masknet.kernels.products import Linear
from masknet.norms import make_norm
from masknet.norms.base import Norm
from masknet.norms.none import NoNorm

_POST_SHARE = 0.25  # of the blocks, with placement mix: as in the paper


class ResidualBlock(nn.Module):
    """R [B, h] → R + branch(R), with norms in three places of which a placement uses one or two.

    Args:
        config: the network's shape.
        mask: of the raw embedding, for a width of h.
        raw_width: D.
        place: pre, post, peri or none.
        depth: number of this block, the first of all (which has no residual) being 1; `layernorm_scaling` divides
            what a pre-norm puts out by √depth (Sun et al., arXiv 2502.05795), `residual` a branch by the root of the
            number of branches (arXiv 2510.03470).
    """

    def __init__(self, config: MaskNetConfig, mask: nn.Module, raw_width: int, place: str, depth: int) -> None:
        super().__init__()
        width, scaling = config.block_width, config.depth_scaling
        self.mask = mask
        layer = StandardizedLinear if config.weight_standardization else Linear
        self.linear = initialize(layer(width, width, bias=False), config.activation)
        self.activation = ACTIVATIONS[config.activation]()
        self.dropout = make_dropout(config.activation, config.dropout)
        self.norm_in = hidden_norm(config, raw_width, used=place in ("pre", "peri"))
        self.norm_out = hidden_norm(config, raw_width, used=place == "peri")
        self.norm_after = hidden_norm(config, raw_width, used=place == "post")
        self.input_scale = 1 / math.sqrt(depth) if scaling == "layernorm_scaling" and place == "pre" else 1.0
        self.branch_scale = 1 / math.sqrt(config.blocks - 1) if scaling == "residual" else 1.0

    def forward(self, x_Bh: torch.Tensor, raw_BD: torch.Tensor) -> torch.Tensor:
        """The next residual stream [B, h]."""
        inner_Bh = normed(self.norm_in, x_Bh, raw_BD) * self.input_scale
        branch_Bh = self.dropout(self.activation(self.linear(self.mask(raw_BD) * inner_Bh)))
        branch_Bh = normed(self.norm_out, branch_Bh, raw_BD)
        return normed(self.norm_after, x_Bh + self.branch_scale * branch_Bh, raw_BD)

    def extra_repr(self) -> str:
        return f"input_scale={self.input_scale:.4g}, branch_scale={self.branch_scale:.4g}"


def hidden_norm(config: MaskNetConfig, raw_width: int, *, used: bool = True) -> Norm:
    """The norm of a hidden vector that `config` names, or none."""
    slot = config.hidden_norm
    if not used:
        return NoNorm((config.block_width,), eps=slot.eps)
    return make_norm(slot.name, (config.block_width,), instance_width=raw_width, **slot.parameters)


def places(config: MaskNetConfig) -> list[str]:
    """Where each residual block has its norms: pre, post, peri or none."""
    branches = config.blocks - 1
    assert config.placement is not None  # the configuration has seen to it
    if config.placement != "mix":
        return [config.placement] * branches
    post = max(1, int(_POST_SHARE * branches))
    return ["post"] * post + ["pre"] * (branches - post)
