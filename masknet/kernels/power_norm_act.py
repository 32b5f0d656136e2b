"""PowerNorm and its activation in one pass, with the sums over rows that its running statistics need.

Legend: B rows, h channels; a tile is [ROWS, BLOCK_H]. Channels do not depend on each other: a wide row is cut.
"""

import torch
import triton
import triton.language as tl

from masknet.kernels.launch import (
    MAX_REGISTERS,
    RowTile,
    as_rows,
    check_activation,
    check_tensors,
    num_programs,
    on_device,
    row_tile_of,
)
from masknet.kernels.rows import load, store_sum


def power_tile(h: int) -> RowTile:
    """The tile for h channels, of 512 at most."""
    return row_tile_of(min(h, 512), entries=1024)


@triton.jit(do_not_specialize=["B"])  # not a kernel for each batch size
def forward_kernel(
    x: tl.tensor,
    inverse: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    sum_square: tl.tensor,
    B: tl.tensor,
    X_STRIDE: tl.constexpr,
    h: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """A program loops over tiles of rows of its channels; its sum is a row of [programs, h]. Grid (programs, tiles)."""
    columns = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    exists = columns < h
    inverse_tile = load(inverse + columns, exists)
    weight_tile, bias_tile = load(weight + columns, exists), load(bias + columns, exists)
    square_sum = tl.zeros((ROWS, BLOCK_H), tl.float32)
    tile = tl.program_id(0)
    while tile < tl.cdiv(B, ROWS):
        rows = (tile * ROWS + tl.arange(0, ROWS))[:, None]
        inside = exists & (rows < B)
        x_tile = load(x + rows.to(tl.int64) * X_STRIDE + columns, inside)
        square_sum += x_tile * x_tile
        y = x_tile * inverse_tile * weight_tile + bias_tile
        if ACTIVATION == "relu":
            y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out + rows.to(tl.int64) * h + columns, y.to(out.dtype.element_ty), mask=inside)
        tile += tl.num_programs(0)
    store_sum(sum_square, square_sum, h, columns, exists)


@triton.jit(do_not_specialize=["B"])
def backward_kernel(
    dout: tl.tensor,
    x: tl.tensor,
    inverse: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    estimate: tl.tensor,
    dx: tl.tensor,
    dweight: tl.tensor,
    dbias: tl.tensor,
    B: tl.tensor,
    DOUT_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    h: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """As the forward kernel, with two sums."""
    columns = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    exists = columns < h
    inverse_tile, estimate_tile = load(inverse + columns, exists), load(estimate + columns, exists)
    weight_tile, bias_tile = load(weight + columns, exists), load(bias + columns, exists)
    dweight_sum = tl.zeros((ROWS, BLOCK_H), tl.float32)
    dbias_sum = tl.zeros((ROWS, BLOCK_H), tl.float32)
    tile = tl.program_id(0)
    while tile < tl.cdiv(B, ROWS):
        rows = (tile * ROWS + tl.arange(0, ROWS))[:, None]
        inside = exists & (rows < B)
        z = load(x + rows.to(tl.int64) * X_STRIDE + columns, inside) * inverse_tile
        g = load(dout + rows.to(tl.int64) * DOUT_STRIDE + columns, inside)
        if ACTIVATION == "relu":
            g = tl.where(z * weight_tile + bias_tile <= 0, 0.0, g)
        dbias_sum += g
        dweight_sum += g * z
        g = (g * weight_tile - estimate_tile * z) * inverse_tile
        tl.store(dx + rows.to(tl.int64) * h + columns, g.to(dx.dtype.element_ty), mask=inside)
        tile += tl.num_programs(0)
    store_sum(dweight, dweight_sum, h, columns, exists)
    store_sum(dbias, dbias_sum, h, columns, exists)


def _check(x: torch.Tensor, activation: str, **vectors: torch.Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, not [B, h]")
    check_tensors(x=(x, x.shape), **{name: (vector, x.shape[1:]) for name, vector in vectors.items()})
    check_activation(activation)


@torch.library.custom_op("masknet::power_norm_act", mutates_args=())
def power_norm_act(
    x_Bh: torch.Tensor, inverse_h: torch.Tensor, weight_h: torch.Tensor, bias_h: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """activation(weight ⊙ z + bias) [B, h] with z = x ⊙ inverse, in the dtype of x, and Σ x² over rows [h] in fp32.

    Without autograd: the backward pass depends on running statistics, which the caller holds (`masknet.norms.power`).

    Args:
        x_Bh: what is normalized.
        inverse_h: 1 / √(ψ² + eps) of each channel.
        weight_h, bias_h: the affine.
        activation: "none" or "relu".

    Raises:
        TypeError: a dtype other than float32, bfloat16 and float16.
        ValueError: shapes that do not fit, an unknown activation.
    """
    _check(x_Bh, activation, inverse=inverse_h, weight=weight_h, bias=bias_h)
    B, h = x_Bh.shape
    out_Bh = x_Bh.new_empty(x_Bh.shape)
    tile = power_tile(h)
    tiles = triton.cdiv(h, tile.BLOCK_H)
    programs = num_programs(x_Bh.device, B, tile.ROWS, tiles)
    sums = x_Bh.new_empty((programs, h), dtype=torch.float32)
    x, x_stride = as_rows(x_Bh)
    vectors = [vector.contiguous() for vector in (inverse_h, weight_h, bias_h)]
    if B > 0:
        with on_device(x):
            forward_kernel[programs, tiles](
                x, *vectors, out_Bh, sums, B, x_stride, h, activation, **tile._asdict(), maxnreg=MAX_REGISTERS
            )
    return out_Bh, sums.sum(0)


@power_norm_act.register_fake
def _(
    x_Bh: torch.Tensor, inverse_h: torch.Tensor, weight_h: torch.Tensor, bias_h: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return x_Bh.new_empty(x_Bh.shape), x_Bh.new_empty(x_Bh.shape[1:], dtype=torch.float32)


@torch.library.custom_op("masknet::power_norm_act_backward", mutates_args=())
def power_norm_act_backward(
    dout_Bh: torch.Tensor,
    x_Bh: torch.Tensor,
    inverse_h: torch.Tensor,
    weight_h: torch.Tensor,
    bias_h: torch.Tensor,
    estimate_h: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, weight and bias in their dtypes, and Σ g ⊙ z over rows [h] in fp32.

    With g = weight ⊙ dout ⊙ activation′ the gradient of x is (g − estimate ⊙ z) ⊙ inverse.

    Args and errors are those of `power_norm_act`, with the gradient of its output first, and estimate_h, which stands
    for mean(g ⊙ z) over rows.
    """
    _check(x_Bh, activation, inverse=inverse_h, weight=weight_h, bias=bias_h, estimate=estimate_h)
    check_tensors(dout=(dout_Bh, x_Bh.shape))
    B, h = x_Bh.shape
    dx_Bh = x_Bh.new_empty(x_Bh.shape)
    tile = power_tile(h)
    tiles = triton.cdiv(h, tile.BLOCK_H)
    programs = num_programs(x_Bh.device, B, tile.ROWS, tiles)
    sums = x_Bh.new_empty((2, programs, h), dtype=torch.float32)
    (dout, dout_stride), (x, x_stride) = as_rows(dout_Bh), as_rows(x_Bh)
    tensors = (dout, x, *(vector.contiguous() for vector in (inverse_h, weight_h, bias_h, estimate_h)), dx_Bh, *sums)
    options = (dout_stride, x_stride, h, activation)
    if B > 0:
        with on_device(x):
            backward_kernel[programs, tiles](*tensors, B, *options, **tile._asdict(), maxnreg=MAX_REGISTERS)
    dweight_h, dbias_h = sums.sum(1)
    # Σ g ⊙ z is weight ⊙ Σ (g / weight) ⊙ z
    return (
        dx_Bh,
        dweight_h.to(weight_h.dtype, copy=True),
        dbias_h.to(bias_h.dtype, copy=True),
        dweight_h * weight_h.float(),
    )


@power_norm_act_backward.register_fake
def _(
    dout_Bh: torch.Tensor,
    x_Bh: torch.Tensor,
    inverse_h: torch.Tensor,
    weight_h: torch.Tensor,
    bias_h: torch.Tensor,
    estimate_h: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    sum_product_h = x_Bh.new_empty(x_Bh.shape[1:], dtype=torch.float32)
    return x_Bh.new_empty(x_Bh.shape), weight_h.new_empty(weight_h.shape), bias_h.new_empty(bias_h.shape), sum_product_h
