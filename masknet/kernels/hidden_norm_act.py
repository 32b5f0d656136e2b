"""LN_HID, its activation and its dropout in one pass: dropout(activation(weight ⊙ x̂ + bias)).

Legend: B rows, h width of a hidden vector; a tile is [ROWS, BLOCK_H].
"""

from typing import Any

import torch
import triton

from masknet.kernels.hidden_kernels import backward_kernel, forward_kernel
from masknet.kernels.launch import (
    MAX_REGISTERS,
    PER_ROW,
    RowTile,
    as_rows,
    check_activation,
    check_norm,
    check_tensors,
    contiguous,
    new_sums,
    num_programs,
    on_device,
    register_gradients,
    row_tile_of,
    total,
)
from masknet.kernels.limits import WIDEST_HIDDEN


def backward_tile(h: int, kind: str, dropout: float) -> RowTile:
    """The backward pass's tile, smaller than the forward pass's: it holds sums besides, "seednorm" most of them."""
    return row_tile_of(h, entries=512 if kind == "seednorm" or dropout > 0 else 1024)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    extra: torch.Tensor | None,
    kind: str,
    eps: float,
    activation: str,
    dropout: float,
) -> None:
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, not [B, h]")
    h = x.shape[1]
    extra_shape = (1,) if kind in PER_ROW else (2, h) if kind == "seednorm" else (h,)
    check_tensors(x=(x, x.shape), weight=(weight, (h,)), bias=(bias, (h,)), extra=(extra, extra_shape))
    check_norm(kind, eps, extra)
    check_activation(activation)
    if kind == "seednorm" and weight is None:
        raise ValueError("seednorm needs weight")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout {dropout} is not in [0, 1)")
    if h > WIDEST_HIDDEN:
        raise ValueError(f"width {h} is above {WIDEST_HIDDEN}")


@torch.library.custom_op("masknet::hidden_norm_act", mutates_args=())
def hidden_norm_act(
    x_Bh: torch.Tensor,
    weight_h: torch.Tensor | None,
    bias_h: torch.Tensor | None,
    extra: torch.Tensor | None,
    kind: str,
    eps: float,
    constant: float,
    activation: str,
    dropout: float,
    seed: int,
) -> torch.Tensor:
    """dropout(activation(weight ⊙ x̂ + bias)) [B, h] in the dtype of x; computed in fp32.

    Args:
        x_Bh: hidden vectors, normalized along h.
        weight_h, bias_h: None for 1 and 0.
        extra: α [1] of "dyt", λ [1] of "bhyt", a centre [h] or None of "affine", α and β [2, h] of "seednorm"; None for
            the others.
        kind: one of `rows.KINDS`.
        eps: the norm's.
        constant: κ of "bhyt"; without meaning for the others.
        activation: "none" or "relu".
        dropout: the share of entries that become 0; kept ones are divided by 1 − dropout.
        seed: of the entries that are dropped; the same seed drops the same ones.

    Raises:
        TypeError: a dtype other than float32, bfloat16 and float16.
        ValueError: shapes that do not fit, h above `WIDEST_HIDDEN`, unknown names, eps ≤ 0, dropout outside [0, 1).
    """
    _check(x_Bh, weight_h, bias_h, extra, kind, eps, activation, dropout)
    B, h = x_Bh.shape
    out_Bh = x_Bh.new_empty(x_Bh.shape)
    tile = row_tile_of(h)
    parameters = contiguous(weight_h, bias_h, extra)
    x, x_stride = as_rows(x_Bh)
    options = (x_stride, h, kind, activation, dropout)
    if B > 0:
        with on_device(x):
            forward_kernel[triton.cdiv(B, tile.ROWS),](
                x, *parameters, out_Bh, B, eps, constant, seed, *options, **tile._asdict()
            )
    return out_Bh


@hidden_norm_act.register_fake
def _(x_Bh: torch.Tensor, *_: Any) -> torch.Tensor:
    return x_Bh.new_empty(x_Bh.shape)


@torch.library.custom_op("masknet::hidden_norm_act_backward", mutates_args=())
def hidden_norm_act_backward(
    dout_Bh: torch.Tensor,
    x_Bh: torch.Tensor,
    weight_h: torch.Tensor | None,
    bias_h: torch.Tensor | None,
    extra: torch.Tensor | None,
    kind: str,
    eps: float,
    constant: float,
    activation: str,
    dropout: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, weight, bias and extra, in their dtypes; empty for those that are None.

    Args and errors are those of `hidden_norm_act`, with the gradient of its output first.
    """
    _check(x_Bh, weight_h, bias_h, extra, kind, eps, activation, dropout)
    check_tensors(dout=(dout_Bh, x_Bh.shape))
    B, h = x_Bh.shape
    dx_Bh = x_Bh.new_empty(x_Bh.shape)
    tile = backward_tile(h, kind, dropout)
    programs = num_programs(x_Bh.device, B, tile.ROWS)
    parameters = contiguous(weight_h, bias_h, extra)
    sums = [new_sums(programs, each, h) for each in parameters[:2]]
    sums.append(new_sums(programs, extra, *((2, h) if kind == "seednorm" else (h,))))
    (dout, dout_stride), (x, x_stride) = as_rows(dout_Bh), as_rows(x_Bh)
    options = (dout_stride, x_stride, h, kind, activation, dropout)
    if B > 0:
        with on_device(x):
            backward_kernel[programs,](
                dout,
                x,
                *parameters,
                dx_Bh,
                *sums,
                B,
                eps,
                constant,
                seed,
                *options,
                **tile._asdict(),
                maxnreg=MAX_REGISTERS,
            )
    dweight, dbias, dextra = (total(*pair, dout_Bh) for pair in zip(sums, parameters, strict=True))
    return dx_Bh, dweight, dbias, dextra


register_gradients(hidden_norm_act, hidden_norm_act_backward, tensors=4)
