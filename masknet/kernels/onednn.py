"""Layers of training on a CPU as autograd functions: products by oneDNN, and the ReLU of bf16.

PyTorch sends fp32 products to MKL, which reaches half of oneDNN's rate on AMD's processors, and the switch that sends
them to oneDNN (`torch.set_float32_matmul_precision`) permits bf16 arithmetic where the processor has it. The operator
used here keeps fp32 arithmetic on every processor.

Legend: B rows, i inputs, o outputs.
"""

import functools
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

# As an int16, a bf16 of the sign bit is negative: -0.0 is the least, -inf is -128, and NaNs are above that.
_MINUS_INF = -128


@functools.cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether this machine's PyTorch multiplies matrices of `dtype`, fp32 or bf16, by oneDNN."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def _product(x_Bi: torch.Tensor, weight_oi: torch.Tensor, bias_o: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + b."""
    if not has_products(x_Bi.dtype):
        return functional.linear(x_Bi, weight_oi, bias_o)
    out_Bo: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_Bi, weight_oi, bias_o, "none", [], "")
    return out_Bo


def _matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left · right, each of which may be a transposed view (which `_product` would copy)."""
    if left.dtype != torch.float32 or not _switch_is_exact():
        return left @ right
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        return left @ right
    finally:
        torch.set_float32_matmul_precision(before)


def _of_weight(grad_Bo: torch.Tensor, x_Bi: torch.Tensor) -> torch.Tensor:
    """gradᵀ · x [o, i]; oneDNN is a fifth faster with the wider of the two first."""
    return _matmul(x_Bi.t(), grad_Bo).t() if x_Bi.shape[1] > grad_Bo.shape[1] else _matmul(grad_Bo.t(), x_Bi)


@functools.cache
def _switch_is_exact() -> bool:
    """Whether products that the switch sends to oneDNN keep fp32 arithmetic on this processor, found by one."""
    probe = torch.linspace(1.0, 2.0, 256 * 256).view(256, 256)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        error = (probe @ probe).double() / (probe.double() @ probe.double()) - 1
    finally:
        torch.set_float32_matmul_precision(before)
    return bool(error.abs().max() < 1e-5)  # of fp32 1e-7, of tf32 and bf16 1e-4 and more


class Product(torch.autograd.Function):
    """x Wᵀ + b in the precision of x: the weights are cast once for both passes, their gradients are of their own."""

    @staticmethod
    def forward(ctx: Any, x_Bi: torch.Tensor, weight_oi: torch.Tensor, bias_o: torch.Tensor | None) -> torch.Tensor:
        """Outputs [B, o]."""
        cast_oi = weight_oi.to(x_Bi.dtype)
        ctx.save_for_backward(x_Bi, cast_oi)
        ctx.dtype = weight_oi.dtype
        return _product(x_Bi, cast_oi, None if bias_o is None else bias_o.to(x_Bi.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Bo: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, W and b."""
        x_Bi, cast_oi = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _matmul(grad_Bo, cast_oi) if of_x else None,
            _of_weight(grad_Bo, x_Bi).to(ctx.dtype, memory_format=torch.contiguous_format) if of_weight else None,
            grad_Bo.sum(0).to(ctx.dtype) if of_bias else None,
        )


class NarrowRelu(torch.autograd.Function):
    """ReLU of bf16, in place and by its bits, with NaN kept: in PyTorch, every pass would go through fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """max(x, 0)."""
        torch.threshold_(x.view(torch.int16), _MINUS_INF, 0)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """The gradient where the output is above 0."""
        (out,) = ctx.saved_tensors
        bits: torch.Tensor = torch.ops.aten.threshold_backward(grad.view(torch.int16), out.view(torch.int16), 0)
        return bits.view(torch.bfloat16)


def product(x_Bi: torch.Tensor, weight_oi: torch.Tensor, bias_o: torch.Tensor | None) -> torch.Tensor:
    """`Product`, typed."""
    out_Bo: torch.Tensor = Product.apply(x_Bi, weight_oi, bias_o)  # type: ignore[no-untyped-call]
    return out_Bo


def narrow_relu(x: torch.Tensor) -> torch.Tensor:
    """`NarrowRelu`, typed."""
    out: torch.Tensor = NarrowRelu.apply(x)  # type: ignore[no-untyped-call]
    return out
