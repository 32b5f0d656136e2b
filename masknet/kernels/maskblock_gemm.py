"""The two products of all MaskBlocks while serving, one launch each, with what follows them in their epilogues.

`mask_project` is the second layer of every block's mask, times what is masked; `block_gemm` is every block's linear
layer, its norm and activation, written into the concatenation of the blocks. Norms read the products' fp32 sums. For
inference: there is no autograd.

Legend: N candidates, K blocks, t aggregation width, Z width of what is masked, h block width.
"""

from dataclasses import asdict
from typing import Any

import torch
import triton
from triton.runtime.driver import driver

from masknet.kernels.gemm_tiles import LaunchShape, block_gemm_kernel, block_shape, mask_project_kernel, project_shape
from masknet.kernels.limits import BLOCK_KINDS, DTYPES, WIDEST_GEMM, padded

INTERPRETED = not isinstance(block_gemm_kernel, triton.JITFunction)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with a last axis of stride 1, and rows so near each other that those of a tile have 32-bit offsets."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 2**22 else x.contiguous()


def _launch(shape: LaunchShape, dtype: torch.dtype) -> dict[str, Any]:
    """A launch's constants: the tile, the precision of fp32 products, and whether operands are widened to fp32."""
    precision = "tf32" if _precision(dtype) == "tf32" else "ieee"
    return {**asdict(shape), "PRECISION": precision, "WIDEN": INTERPRETED}  # the interpreter's products lack bf16


def _precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "half"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _architecture() -> int:
    return 0 if INTERPRETED else int(driver.active.get_current_target().arch)


def _check(
    name: str, operands: dict[str, torch.Tensor], vectors: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]]
) -> None:
    if len({x.dtype for x in operands.values()}) > 1:
        kinds = ", ".join(f"{key} {x.dtype}" for key, x in operands.items())
        raise TypeError(f"{name}: a product's operands must be of one type, not {kinds}")
    for key, (x, shape) in vectors.items():
        if x is not None and x.dtype not in DTYPES:
            raise TypeError(f"{name}: {key} must be float32, bfloat16 or float16, not {x.dtype}")
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name}: {key} must have shape {shape}, not {tuple(x.shape)}")


def _masked(
    hidden_NT: torch.Tensor, weight_KZt: torch.Tensor, bias_KZ: torch.Tensor, x_NZ: torch.Tensor
) -> torch.Tensor:
    """Checks mask_project's arguments and makes room for its result."""
    (blocks, width, aggregation), n = weight_KZt.shape, hidden_NT.shape[0]
    _check(
        "mask_project",
        {"hidden": hidden_NT, "weight": weight_KZt},
        {
            "hidden": (hidden_NT, (n, blocks * aggregation)),
            "bias": (bias_KZ, (blocks, width)),
            "x": (x_NZ, (n, width)),
        },
    )
    return padded(hidden_NT, n, blocks, width)


@torch.library.custom_op("masknet::mask_project", mutates_args=())
def mask_project(
    hidden_NT: torch.Tensor, weight_KZt: torch.Tensor, bias_KZ: torch.Tensor, x_NZ: torch.Tensor
) -> torch.Tensor:
    """(W_k a_k + b_k) ⊙ x for every block k: what the blocks' linear layers read.

    Args:
        hidden_NT: a of all blocks side by side, [N, K·t], fp32, bf16 or fp16; any row stride.
        weight_KZt: W, [K, Z, t], the type of hidden; any strides of the first two axes (`align_rows`).
        bias_KZ: b, [K, Z].
        x_NZ: what is masked, any of the three types; any row stride.

    Returns:
        [N, K, Z] in the type of hidden; rows start at multiples of 16 entries.

    Raises:
        TypeError: fp64, or hidden and weight of two types.
        ValueError: shapes that do not fit.
    """
    out_NKZ = _masked(hidden_NT, weight_KZt, bias_KZ, x_NZ)
    n, blocks, width = out_NKZ.shape
    if n == 0:
        return out_NKZ
    hidden, weight, x = _rows(hidden_NT), _rows(weight_KZt), _rows(x_NZ)
    shape = project_shape(n, _precision(hidden.dtype))
    grid = (triton.cdiv(n, shape.BLOCK_M), triton.cdiv(width, shape.BLOCK_N), blocks)
    with torch.cuda.device(hidden.get_device()):  # -1, of the CPU, does nothing
        mask_project_kernel[grid](
            hidden,
            weight,
            bias_KZ.contiguous(),
            x,
            out_NKZ,
            n,
            hidden.stride(0),
            *weight.stride()[:2],
            x.stride(0),
            *out_NKZ.stride()[:2],
            T=weight.shape[2],
            Z=width,
            **_launch(shape, hidden.dtype),
        )
    return out_NKZ


mask_project.register_fake(_masked)


def _hidden(
    masked_NKZ: torch.Tensor,
    weight_KhZ: torch.Tensor,
    bias_Kh: torch.Tensor | None,
    scale_Kh: torch.Tensor | None,
    shift_Kh: torch.Tensor | None,
    kind: str,
    eps: float,
    activation: str,
) -> torch.Tensor:
    """Checks block_gemm's arguments and makes room for its result."""
    blocks, width, masked = weight_KhZ.shape
    n = masked_NKZ.shape[0]
    if width > WIDEST_GEMM:
        raise ValueError(f"block_gemm: blocks of {width} units; more than {WIDEST_GEMM} do not fit a tile")
    if kind not in BLOCK_KINDS:
        raise ValueError(f"block_gemm: kind must be one of {', '.join(BLOCK_KINDS)}, not {kind!r}")
    if activation not in ("none", "relu"):
        raise ValueError(f"block_gemm: activation must be none or relu, not {activation!r}")
    _check(
        "block_gemm",
        {"masked": masked_NKZ, "weight": weight_KhZ},
        {
            "masked": (masked_NKZ, (n, blocks, masked)),
            "bias": (bias_Kh, (blocks, width)),
            "scale": (scale_Kh, (blocks, width)),
            "shift": (shift_Kh, (blocks, width)),
        },
    )
    return masked_NKZ.new_empty(n, blocks * width)


@torch.library.custom_op("masknet::block_gemm", mutates_args=())
def block_gemm(
    masked_NKZ: torch.Tensor,
    weight_KhZ: torch.Tensor,
    bias_Kh: torch.Tensor | None,
    scale_Kh: torch.Tensor | None,
    shift_Kh: torch.Tensor | None,
    kind: str,
    eps: float,
    activation: str,
) -> torch.Tensor:
    """activation(scale_k ⊙ core(W_k x_k + b_k) + shift_k) for every block k, side by side.

    Args:
        masked_NKZ: x, [N, K, Z], fp32, bf16 or fp16; any strides of the first two axes.
        weight_KhZ: W, [K, h, Z], the type of masked; any strides of the first two axes (`align_rows`).
        bias_Kh, scale_Kh, shift_Kh: each may be left out.
        kind: none, rms or l1 (`masknet.kernels.rows`).
        eps: the core's.
        activation: none or relu.

    Returns:
        [N, K·h] in the type of masked.

    Raises:
        TypeError: fp64, or masked and weight of two types.
        ValueError: h above `WIDEST_GEMM`, an unknown kind or activation, shapes that do not fit.
    """
    out_NH = _hidden(masked_NKZ, weight_KhZ, bias_Kh, scale_Kh, shift_Kh, kind, eps, activation)
    n, (blocks, width, _) = masked_NKZ.shape[0], weight_KhZ.shape
    if n == 0:
        return out_NH
    masked, weight = _rows(masked_NKZ), _rows(weight_KhZ)
    shape = block_shape(n, width, _precision(masked.dtype), _architecture())
    with torch.cuda.device(masked.get_device()):
        block_gemm_kernel[(triton.cdiv(n, shape.BLOCK_M), blocks)](
            masked,
            weight,
            *(x if x is None else x.contiguous() for x in (bias_Kh, scale_Kh, shift_Kh)),
            out_NH,
            n,
            *masked.stride()[:2],
            *weight.stride()[:2],
            out_NH.stride(0),
            eps,
            Z=weight.shape[2],
            H=width,
            KIND=kind,
            RELU=activation == "relu",
            **_launch(shape, masked.dtype),
        )
    return out_NH


block_gemm.register_fake(_hidden)
