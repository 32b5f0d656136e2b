"""A linear layer of bytes.

Legend: N rows, Z inputs and O outputs of a layer.
"""

from typing import Any

import torch
from torch import nn

from masknet.folding.packed import Activation
from serving.backends.grid import Grid, steps_of


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


def grid_of(layer: nn.Module) -> Grid:
    """Of a layer that is one of these."""
    assert isinstance(layer, QuantizedLinear)
    return layer.grid
