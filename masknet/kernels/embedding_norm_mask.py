"""LN_EMB and the mask in one pass: mask ⊙ (weight ⊙ x̂ + bias), each field's embedding normalized on its own.

Legend: B rows, F fields, d embedding width, D = F·d; a tile is [ROWS, BLOCK_F, BLOCK_D].
"""

from typing import Any

import torch
import triton

from masknet.kernels.embedding_kernels import backward_kernel, forward_kernel
from masknet.kernels.launch import (
    MAX_REGISTERS,
    PER_ROW,
    Tile,
    as_rows,
    check_norm,
    check_tensors,
    contiguous,
    new_sums,
    num_programs,
    on_device,
    register_gradients,
    tile_of,
    total,
)
from masknet.kernels.limits import WIDEST_FIELD


def backward_tile(F: int, d: int) -> Tile:
    """The backward pass's tile, smaller than the forward pass's: it holds sums besides."""
    return tile_of(F, d, entries=1024)


def _check(
    x: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    extra: torch.Tensor | None,
    kind: str,
    eps: float,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, not [B, F, d]")
    if kind == "seednorm":
        raise ValueError("seednorm is for hidden vectors")
    B, F, d = x.shape
    check_tensors(x=(x, (B, F, d)), mask=(mask, (B, F * d)), weight=(weight, (F, d)), bias=(bias, (F, d)))
    check_tensors(extra=(extra, (F, 1) if kind in PER_ROW else (F, d)))
    check_norm(kind, eps, extra)
    if d > WIDEST_FIELD:
        raise ValueError(f"width {d} is above {WIDEST_FIELD}")


@torch.library.custom_op("masknet::embedding_norm_mask", mutates_args=())
def embedding_norm_mask(
    x_BFd: torch.Tensor,
    mask_BD: torch.Tensor,
    weight_Fd: torch.Tensor | None,
    bias_Fd: torch.Tensor | None,
    extra: torch.Tensor | None,
    kind: str,
    eps: float,
    constant: float,
) -> torch.Tensor:
    """mask ⊙ (weight ⊙ x̂ + bias) [B, D], in the wider dtype of x and mask; computed in fp32.

    Args:
        x_BFd: embeddings, normalized along d.
        mask_BD: what they are multiplied by.
        weight_Fd, bias_Fd: None for 1 and 0.
        extra: α [F, 1] of "dyt", λ [F, 1] of "bhyt", a centre [F, d] or None of "affine"; None for the others.
        kind: one of `rows.KINDS`, but not "seednorm".
        eps: the norm's.
        constant: κ of "bhyt"; without meaning for the others.

    Raises:
        TypeError: a dtype other than float32, bfloat16 and float16.
        ValueError: shapes that do not fit, d above `WIDEST_FIELD`, an unknown kind, eps ≤ 0.
    """
    _check(x_BFd, mask_BD, weight_Fd, bias_Fd, extra, kind, eps)
    B, F, d = x_BFd.shape
    out_BD = x_BFd.new_empty(mask_BD.shape, dtype=torch.promote_types(x_BFd.dtype, mask_BD.dtype))
    tile = tile_of(F, d)
    grid = (triton.cdiv(B, tile.ROWS), triton.cdiv(F, tile.BLOCK_F))
    parameters = contiguous(weight_Fd, bias_Fd, extra)
    (x, x_stride), (mask, mask_stride) = as_rows(x_BFd), as_rows(mask_BD)
    shape = (x_stride, mask_stride, F, d)
    if B > 0:
        with on_device(x):
            forward_kernel[grid](x, mask, *parameters, out_BD, B, eps, constant, *shape, kind, **tile._asdict())
    return out_BD


@embedding_norm_mask.register_fake
def _(x_BFd: torch.Tensor, mask_BD: torch.Tensor, *_: Any) -> torch.Tensor:
    return x_BFd.new_empty(mask_BD.shape, dtype=torch.promote_types(x_BFd.dtype, mask_BD.dtype))


@torch.library.custom_op("masknet::embedding_norm_mask_backward", mutates_args=())
def embedding_norm_mask_backward(
    dout_BD: torch.Tensor,
    x_BFd: torch.Tensor,
    mask_BD: torch.Tensor,
    weight_Fd: torch.Tensor | None,
    bias_Fd: torch.Tensor | None,
    extra: torch.Tensor | None,
    kind: str,
    eps: float,
    constant: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, mask, weight, bias and extra, in their dtypes; empty for those that are None.

    Args and errors are those of `embedding_norm_mask`, with the gradient of its output first.
    """
    _check(x_BFd, mask_BD, weight_Fd, bias_Fd, extra, kind, eps)
    B, F, d = x_BFd.shape
    check_tensors(dout=(dout_BD, (B, F * d)))
    dx_BFd, dmask_BD = x_BFd.new_empty(x_BFd.shape), mask_BD.new_empty(mask_BD.shape)
    tile = backward_tile(F, d)
    field_tiles = triton.cdiv(F, tile.BLOCK_F)
    programs = num_programs(x_BFd.device, B, tile.ROWS, field_tiles)
    parameters = contiguous(weight_Fd, bias_Fd, extra)
    sums = [new_sums(programs, each, F, d) for each in parameters]
    (dout, dout_stride), (x, x_stride), (mask, mask_stride) = as_rows(dout_BD), as_rows(x_BFd), as_rows(mask_BD)
    shape = (dout_stride, x_stride, mask_stride, F, d)
    if B > 0:
        tensors = (dout, x, mask, *parameters, dx_BFd, dmask_BD, *sums)
        with on_device(x):
            backward_kernel[programs, field_tiles](
                *tensors, B, eps, constant, *shape, kind, **tile._asdict(), maxnreg=MAX_REGISTERS
            )
    dweight, dbias, dextra = (total(*pair, dout_BD) for pair in zip(sums, parameters, strict=True))
    return dx_BFd, dmask_BD, dweight, dbias, dextra


register_gradients(embedding_norm_mask, embedding_norm_mask_backward, tensors=5)
