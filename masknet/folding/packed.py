"""Linear layers for inference, on a CPU by oneDNN, with weights in its GEMM's layout and products in its epilogue.

PyTorch's own fp32 product goes to MKL, which reaches half of oneDNN's rate on AMD's processors, and a product with a
mask behind it reads and writes its output again. Elsewhere, and in other precisions, these are torch's linear layers.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.nn import functional

Activation = Literal["none", "relu"]


# Multiplications from which oneDNN is faster: a call of it costs 12 µs more than one of MKL. One row is bound by the
# reading of the weights, in which oneDNN has no advantage.
_LEAST_WORK, _LEAST_ROWS = 300_000, 2


@functools.cache
def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class PackedLinear(nn.Module):
    """W x + b with fixed weights, then a ReLU, or a product with something of the output's shape.

    Args:
        weight: [outputs, inputs].
        bias: [outputs] or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self._packed: torch.Tensor | None = None
        self._version = -1  # of the weight when it was packed

    def forward(
        self,
        x_NZ: torch.Tensor,
        activation: Activation = "none",
        *,
        times: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Outputs [N, outputs].

        Args:
            x_NZ: inputs.
            activation: what follows, where `times` is None.
            times: multiplied with the output; [N, outputs] or [1, outputs].
            bias: in place of the layer's own.
        """
        bias = self.bias if bias is None else bias
        if self.uses_onednn(x_NZ):
            return self._by_onednn(x_NZ, activation, times, bias)
        out = functional.linear(x_NZ, self.weight, bias)
        if times is not None:
            return out.mul_(times)
        return out.relu_() if activation == "relu" else out

    def uses_onednn(self, x_NZ: torch.Tensor) -> bool:
        """Whether oneDNN computes the outputs for x."""
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):  # both have their own ways of products
            return False
        rows, weight = x_NZ.shape[0], self.weight
        if rows < _LEAST_ROWS or rows * weight.numel() < _LEAST_WORK:
            return False
        return x_NZ.dtype == weight.dtype == torch.float32 and x_NZ.device.type == "cpu" and _has_onednn()

    def _by_onednn(
        self, x_NZ: torch.Tensor, activation: Activation, times: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        version = 0 if self.weight.is_inference() else self.weight._version  # inference tensors count none
        if self._packed is None or version != self._version:
            self._packed, self._version = torch.ops.mkldnn._reorder_linear_weight(self.weight, None), version
        linear: Any = torch.ops.mkldnn._linear_pointwise
        out: torch.Tensor
        if times is not None:
            out = linear.binary(x_NZ, times, self._packed, bias, "mul")
            return out
        out = linear(x_NZ, self._packed, bias, "none", [], "")
        return out.relu_() if activation == "relu" else out  # oneDNN's own would make 0 of NaN

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self._packed = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # copies lay out their own

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} → {self.weight.shape[0]}, bias={self.bias is not None}"
