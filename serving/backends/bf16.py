"""bf16: products of bfloat16 by oneDNN, in 55 % of the time of fp32's; norms and the last layer are fp32's.

Legend: N rows, Z inputs and O outputs of a layer.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from masknet.folding import ServingNetwork
from masknet.folding.blocks import FirstLayers
from masknet.folding.packed import Activation, PackedLinear
from serving.backends.layers import ContextApart, ContextBias, Part, Widened, with_layers


def runs_here() -> bool:
    """Whether this CPU multiplies bfloat16; others would be slower than in fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class HalfLinear(nn.Module):
    """W x + b in bf16, in place of a `PackedLinear`; always by oneDNN, whose sums do not depend on the number of rows.

    Args:
        weight: [O, Z].
        bias: [O] or None.
    """

    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16().contiguous(), None)
        self.register_buffer("bias", None if bias is None else bias.bfloat16())

    def forward(
        self,
        x_NZ: torch.Tensor,
        activation: Activation = "none",
        *,
        times: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Outputs [N, O] in bf16, as `PackedLinear`'s."""
        linear: Any = torch.ops.mkldnn._linear_pointwise
        bias = self.bias if bias is None else bias
        out: torch.Tensor
        if times is not None:
            out = linear.binary(x_NZ, times, self._weight, bias, "mul")
            return out
        out = linear(x_NZ, self._weight, bias, "none", [], "")
        return out.relu_() if activation == "relu" else out


class HalfNetwork(nn.Module):
    """A folded network in bf16.

    Args:
        network: on the CPU.
    """

    def __init__(self, network: ServingNetwork) -> None:
        super().__init__()
        self.network = with_layers(network, _replaced, _first_layers)

    def forward(self, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
        """Logits [N]; a row alone is computed twice, for oneDNN sums a vector's products in another order."""
        rows = candidates_NR.shape[0]
        candidates_NR = candidates_NR.expand(2, -1) if rows == 1 else candidates_NR
        logit_N: torch.Tensor = self.network(context_1C.bfloat16(), candidates_NR.bfloat16())
        return logit_N[:rows]


def _replaced(name: str, layer: PackedLinear) -> nn.Module:
    return Widened(layer) if len(layer.weight) == 1 else HalfLinear(layer.weight, layer.bias)


def _first_layers(network: ServingNetwork) -> ContextApart:
    first = network.first
    assert isinstance(first, FirstLayers)
    context_bias, parts = first_parts(first, torch.ones(sum(first.sizes)), "relu")
    return ContextApart(context_bias, parts, first.sizes, torch.Tensor.bfloat16)


def first_parts(first: FirstLayers, factor_T: torch.Tensor, activation: Activation) -> tuple[ContextBias, list[Part]]:
    """What a `ContextApart` is made of, in bf16.

    Args:
        first: in fp32.
        factor_T: positive, what units are multiplied by.
        activation: of the units.
    """
    assert first.whole.bias is not None
    weight_TD, bias_T = first.whole.weight * factor_T.unsqueeze(1), first.whole.bias * factor_T
    width = first.context.weight.shape[1]
    context = HalfLinear(weight_TD[:, :width], bias_T) if width else None
    layers = [HalfLinear(part, None) for part in torch.split(weight_TD[:, width:], first.sizes)]
    return partial(_context_bias, context, bias_T.bfloat16()), [partial(_part, layer, activation) for layer in layers]


def _context_bias(layer: HalfLinear | None, bias_T: torch.Tensor, context_1C: torch.Tensor) -> torch.Tensor:
    bias: torch.Tensor = bias_T if layer is None else layer(context_1C.bfloat16())[0]
    return bias


def _part(layer: HalfLinear, activation: Activation, x_NR: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = layer(x_NR, activation, bias=bias)
    return out
