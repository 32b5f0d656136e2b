"""int8: products of bytes by oneDNN, in 40 % of the time of fp32's.

Inputs of layers are rounded to 256 steps between bounds found on rows of data (`ranges`), weights to 255 steps by
output. Bounds are fixed, so a row's score does not depend on its batch. Columns of an input that are small beside
others would be lost in the common steps: what is divided out of a column is multiplied into its weights, half way, as
in SmoothQuant (Xiao et al., arXiv 2211.10438), and costs nothing, for the columns are scaled anyway. Sums are exact;
norms, masks' products and the last layer stay fp32.

`mixed` is int8 where no input is negative, behind ReLUs. Layers that read embeddings, or products of those with masks,
whose tails are long, make most of int8's error, and are in bf16.

Legend: N rows, Z inputs and O outputs of a layer, T units of all first layers.
"""

from functools import partial

import torch
from torch import nn

from masknet.folding import ServingNetwork
from masknet.folding.blocks import FirstLayers, FoldedBlock, Hidden
from masknet.folding.network import ParallelBody
from masknet.folding.packed import Activation, PackedLinear
from serving.backends.bf16 import HalfLinear, first_parts
from serving.backends.grid import Grid, steps_of
from serving.backends.layers import ContextApart, Part, readers, with_layers
from serving.backends.quantized import QuantizedLinear, grid_of
from serving.backends.ranges import FIRST, Ranges, in_order


def runs_here() -> bool:
    """Whether this CPU multiplies bytes; others would saturate sums of pairs, or be slower than in fp32."""
    return bool(torch.cpu._is_vnni_supported()) and hasattr(torch.ops.onednn, "qlinear_pointwise")


class _HalfWithin(nn.Module):
    """A layer in bf16 between others in fp32.

    Args:
        layer: in fp32.
    """

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        self.layer = HalfLinear(layer.weight, layer.bias)

    def forward(self, x_NZ: torch.Tensor, activation: Activation = "none") -> torch.Tensor:
        """Outputs [N, O] in fp32."""
        return self.layer(x_NZ.bfloat16(), activation).float()


class _OnGrid(nn.Module):
    """A block whose output is put on the grid of what reads it, while it is in the cache."""

    def __init__(self, block: nn.Module, grid: Grid) -> None:
        super().__init__()
        self.block, self.grid = block, grid

    def forward(self, x_NZ: torch.Tensor, hidden: Hidden) -> torch.Tensor:
        out_Nh: torch.Tensor = self.block(x_NZ, hidden)
        if out_Nh is x_NZ:  # which others read
            return self.grid(out_Nh)
        return self.grid.of_steps(out_Nh.mul_(self.grid.factor_Z))  # a tenth of the time of another tensor


class Int8Network(nn.Module):
    """A folded network in int8.

    Args:
        network: on the CPU.
        ranges: of the same network, folded without a context.
        mixed: whether layers whose inputs may be negative are in bf16.
    """

    def __init__(self, network: ServingNetwork, ranges: Ranges, *, mixed: bool = False) -> None:
        super().__init__()
        self._mixed, ranges = mixed, in_order(ranges, network)

        def replaced(name: str, layer: PackedLinear) -> nn.Module:
            if len(layer.weight) == 1:  # the logit
                return layer
            grid = Grid.of(ranges[name], layer.weight)
            if mixed and grid.zero:
                return _HalfWithin(layer)
            return QuantizedLinear(layer.weight, layer.bias, grid)

        first = _half_first_layers if mixed else partial(_first_layers, ranges=ranges)
        self.network = with_layers(network, replaced, first)
        for block in self.network.modules():
            second, linear = (block.second, block.linear) if isinstance(block, FoldedBlock) else (None, None)
            if isinstance(second, QuantizedLinear) and isinstance(linear, QuantizedLinear):
                second.give_steps_to(linear)
        body = self.network.body
        if isinstance(body, ParallelBody) and isinstance(head := body.head[0], QuantizedLinear):
            width = len(head.grid.smooth_Z) // len(body.blocks)
            for k, block in enumerate(body.blocks):
                body.blocks[k] = _OnGrid(block, head.grid.part(k * width, (k + 1) * width))

    def forward(self, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
        """Logits [N]; NaN for rows that are not finite, which bytes cannot show.

        A row alone is computed twice where products are in bf16, as in `HalfNetwork`.
        """
        rows = candidates_NR.shape[0]
        candidates_NR = candidates_NR.expand(2, -1) if self._mixed and rows == 1 else candidates_NR
        logit_N: torch.Tensor = self.network(context_1C, candidates_NR)
        return logit_N.add_(0.0 * (candidates_NR.sum(1) + context_1C.sum()))[:rows]


def _first_layers(network: ServingNetwork, ranges: Ranges) -> ContextApart:
    """The first layers, whose units go as bytes to the layers that read them.

    Steps are those of whole rows, however many columns are the context's: /rank and /predict differ in the order of
    sums alone.
    """
    first, targets = network.first, _targets(network)
    assert isinstance(first, FirstLayers)
    assert first.whole.bias is not None
    divided_T = torch.cat([target.smooth_Z for target in targets])
    weight_TD, bias_T = first.whole.weight / divided_T.unsqueeze(1), first.whole.bias / divided_T
    grid = Grid.of(ranges[FIRST], weight_TD)
    scale_T = steps_of(weight_TD * grid.smooth_Z)
    width = first.context.weight.shape[1]
    candidates = grid.part(width, weight_TD.shape[1])
    split = (torch.split(each, first.sizes) for each in (weight_TD[:, width:], scale_T))
    parts = [
        _part(QuantizedLinear(weight, None, candidates, scale), target)
        for weight, scale, target in zip(*split, targets, strict=True)
    ]
    context = QuantizedLinear(weight_TD[:, :width], bias_T, grid.part(0, width), scale_T) if width else None
    return ContextApart(partial(_context_bias, context, bias_T), parts, first.sizes, candidates)


def _half_first_layers(network: ServingNetwork) -> ContextApart:
    """The same of `mixed`: in bf16, with units in the steps of the grids that they are put on; byte 0 is their ReLU."""
    first, targets = network.first, _targets(network)
    assert isinstance(first, FirstLayers)
    context_bias, parts = first_parts(first, torch.cat([target.factor_Z for target in targets]), "none")
    rounded = [partial(_rounded, *each) for each in zip(parts, targets, strict=True)]
    return ContextApart(context_bias, rounded, first.sizes, torch.Tensor.bfloat16)


def _rounded(part: Part, target: Grid, x_NR: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return target.of_steps(part(x_NR, bias).float())  # bfloat16's own operations take twice as long


def _targets(network: ServingNetwork) -> list[Grid]:
    """The grids of the layers that read the first layers' units, in their order."""
    return [grid_of(layer) for _, layer in sorted(readers(network), key=lambda each: each[0])]


def _part(layer: QuantizedLinear, target: Grid) -> Part:
    return lambda bytes_NR, bias: layer.bytes_for(target, bytes_NR, bias)


def _context_bias(layer: QuantizedLinear | None, bias_T: torch.Tensor, context_1C: torch.Tensor) -> torch.Tensor:
    bias: torch.Tensor = bias_T if layer is None else layer(context_1C)[0]
    return bias
