"""int8: products of bytes by oneDNN, in 40 % of the time of fp32's.

Inputs of layers are rounded to 256 steps between bounds that were seen on rows of data (`ranges`), weights to 255 steps
by output. Bounds are fixed, so a row's score does not depend on its batch. Columns of an input that are small beside
others would be lost in the common steps: what is divided out of a column is multiplied into its weights, half way, as
in SmoothQuant (Xiao et al., arXiv 2211.10438), and costs nothing, for the columns are scaled anyway. Sums are exact;
norms, masks' products and the last layer stay fp32.

Legend: N rows, Z inputs and O outputs of a layer, T units of all first layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from masknet.folding import ServingNetwork
from masknet.folding.blocks import FirstLayers, FoldedBlock, Hidden
from masknet.folding.network import ParallelBody
from masknet.folding.packed import Activation, PackedLinear
from serving.backends.grid import Grid, steps_of
from serving.backends.layers import ContextApart, readers, with_layers
from serving.backends.ranges import FIRST, Ranges, in_order


def runs_here() -> bool:
    """Whether this CPU multiplies bytes; others would saturate sums of pairs, or be slower than in fp32."""
    return bool(torch.cpu._is_vnni_supported()) and hasattr(torch.ops.onednn, "qlinear_pointwise")


class QuantizedLinear(nn.Module):
    """W x + b with weights of eight bits, in place of a `PackedLinear`.

    Args:
        weight: [O, Z], fp32.
        bias: [O] or None.
        grid: of the input.
        scale_O: of the weights' steps; by default as fine as the weights allow.
    """

    bias: torch.Tensor | None
    _scale: torch.Tensor

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, grid: Grid, scale_O: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.grid, self._in_steps = grid, False
        weight_OZ = weight * grid.smooth_Z
        scale_O = steps_of(weight_OZ) if scale_O is None else scale_O
        bytes_OZ = (weight_OZ / scale_O.unsqueeze(1)).round().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(bytes_OZ, None)
        self.register_buffer("_scale", scale_O)
        self.register_buffer("_zeros", torch.zeros(len(weight), dtype=torch.int64))
        self.register_buffer("bias", bias)

    def forward(
        self,
        x_NZ: torch.Tensor,
        activation: Activation = "none",
        *,
        times: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Outputs [N, O] in fp32, as `PackedLinear`'s; of bytes on this layer's grid, or of steps of it, too."""
        bytes_NZ = x_NZ
        if x_NZ.dtype != torch.uint8:
            bytes_NZ = self.grid.of_steps(x_NZ) if self._in_steps else self.grid(x_NZ)
        out: torch.Tensor = self._product(bytes_NZ, self.bias if bias is None else bias, 1.0, torch.float32, "none")
        if times is not None:
            return out.mul_(times)
        return out.relu_() if activation == "relu" else out

    def give_steps_to(self, reader: "QuantizedLinear") -> None:
        """Multiply outputs, in the product's scale, by what the one layer that reads them would multiply them by."""
        self._scale = self._scale * reader.grid.factor_Z
        if self.bias is not None:
            self.bias = self.bias * reader.grid.factor_Z
        reader._in_steps = True

    def bytes_for(self, target: Grid, bytes_NZ: torch.Tensor, bias_O: torch.Tensor) -> torch.Tensor:
        """relu(W x + b) [N, O] as bytes on another layer's grid, whose `smooth_Z` is in W and b already."""
        return self._product(bytes_NZ, bias_O, target.scale, torch.uint8, "relu")

    def _product(
        self, bytes_NZ: torch.Tensor, bias: torch.Tensor | None, scale: float, dtype: torch.dtype, post: str
    ) -> torch.Tensor:
        product: Any = torch.ops.onednn.qlinear_pointwise
        weight = (self._weight, self._scale, self._zeros, bias)
        out: torch.Tensor = product(bytes_NZ, self.grid.scale, self.grid.zero, *weight, scale, 0, dtype, post, [], "")
        return out


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
    """

    def __init__(self, network: ServingNetwork, ranges: Ranges) -> None:
        super().__init__()
        ranges = in_order(ranges, network)

        def replaced(name: str, layer: PackedLinear) -> nn.Module:
            if len(layer.weight) == 1:  # the logit
                return layer
            return QuantizedLinear(layer.weight, layer.bias, Grid.of(ranges[name], layer.weight))

        self.network = with_layers(network, replaced, partial(_first_layers, ranges=ranges))
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
        """Logits [N]; NaN for rows that are not finite, which bytes cannot show."""
        logit_N: torch.Tensor = self.network(context_1C, candidates_NR)
        return logit_N.add_(0.0 * (candidates_NR.sum(1) + context_1C.sum()))


def _first_layers(network: ServingNetwork, ranges: Ranges) -> ContextApart:
    """The first layers, whose units go as bytes to the layers that read them.

    Steps are those of whole rows, however many columns are the context's: /rank and /predict differ in the order of
    sums alone.
    """
    first = network.first
    assert isinstance(first, FirstLayers)
    assert first.whole.bias is not None
    targets = [grid_of(layer) for _, layer in sorted(readers(network), key=lambda each: each[0])]
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


def grid_of(layer: nn.Module) -> Grid:
    """Of a layer that is one of these."""
    assert isinstance(layer, QuantizedLinear)
    return layer.grid


def _part(layer: QuantizedLinear, target: Grid) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda bytes_NR, bias: layer.bytes_for(target, bytes_NR, bias)


def _context_bias(layer: QuantizedLinear | None, bias_T: torch.Tensor, context_1C: torch.Tensor) -> torch.Tensor:
    bias: torch.Tensor = bias_T if layer is None else layer(context_1C)[0]
    return bias
