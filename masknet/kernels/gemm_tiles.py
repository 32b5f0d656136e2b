"""Matrix products over tiles: the kernels of the masks' second layers and of the blocks' linear layers.

Axes M, N and K of a tile are a product's rows, columns and summed axis. Sums are fp32. Blocks are an axis of the grid.
The shapes are those whose sums stay in registers when compiled for architectures 80, 90 and 100; none was timed.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from masknet.kernels.rows import normalize

FEW_ROWS = 512  # up to here small tiles, so that most multiprocessors have one


@dataclass(frozen=True)
class LaunchShape:
    """A tile, and how many warps and pipeline stages work on it."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# without tensor cores, which "ieee" does not use, operands pass through registers, and a short K leaves room for them
BLOCK_K = {"ieee": 16, "tf32": 32, "half": 64}


def project_shape(rows: int, precision: str) -> LaunchShape:
    """mask_project's for `rows` candidates; precision: ieee or tf32 of fp32 operands, half for those of 16 bits."""
    block_k = BLOCK_K[precision]
    if rows <= 64:  # reading the weights is what takes time: narrow tiles share it among more programs
        return LaunchShape(16, 32, 2 * block_k, 4, 4)
    if rows <= FEW_ROWS:
        return LaunchShape(64, 64, block_k, 4, 4)
    return LaunchShape(128, 128, block_k, 8, 3)


def block_shape(rows: int, width: int, precision: str, architecture: int) -> LaunchShape:
    """block_gemm's for `rows` candidates and blocks of `width` units; architecture: 80, 90, 100, … of the GPU."""
    block_n, block_k = max(16, triton.next_power_of_2(width)), BLOCK_K[precision]
    warps = 8 if block_n > 256 else 4
    if rows <= FEW_ROWS:
        return LaunchShape(16, block_n, block_k, warps, 2)
    if precision == "ieee":
        return LaunchShape(32, block_n, block_k, 2 * warps, 2)
    blackwell = architecture >= 100  # sums pass from tensor memory to registers, and 64 × 512 of them spill there
    if block_n <= 256:
        return LaunchShape(64, block_n, block_k, 8 if blackwell and block_n > 128 else 4, 3)
    if blackwell or precision == "tf32":
        return LaunchShape(32, block_n, block_k, warps, 2)
    return LaunchShape(64, block_n, block_k // 2, warps, 3)


@triton.jit
def matmul(
    acc: tl.tensor,
    a: tl.tensor,
    a_row: tl.tensor,
    inside_M: tl.tensor,
    b: tl.tensor,
    b_row: tl.tensor,
    inside_N: tl.tensor,
    LENGTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    """acc + a bᵀ for rows of LENGTH entries, from pointers to the tile's first rows; 0 where a row is not inside."""
    # 32-bit offsets from a moving base: 64-bit ones of a wide tile would not stay in registers
    m, n = tl.arange(0, BLOCK_M)[:, None] * a_row, tl.arange(0, BLOCK_N)[None, :] * b_row
    for start in range(0, LENGTH - LENGTH % BLOCK_K, BLOCK_K):
        k = tl.arange(0, BLOCK_K)
        x = tl.load(a + start + (m + k[None, :]), mask=inside_M[:, None], other=0.0)
        w = tl.load(b + start + (n + k[:, None]), mask=inside_N[None, :], other=0.0)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    # what a whole tile does not fit is apart: masks along k narrow the loads
    for start in tl.static_range(LENGTH - LENGTH % BLOCK_K, LENGTH, 16):
        k = tl.arange(0, 16)
        inside = k < LENGTH - start
        x = tl.load(a + start + (m + k[None, :]), mask=inside_M[:, None] & inside[None, :], other=0.0)
        w = tl.load(b + start + (n + k[:, None]), mask=inside_N[None, :] & inside[:, None], other=0.0)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["rows"])
def mask_project_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    x: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    hidden_row: tl.tensor,
    weight_block: tl.tensor,
    weight_row: tl.tensor,
    x_row: tl.tensor,
    out_row: tl.tensor,
    out_block: tl.tensor,
    T: tl.constexpr,
    Z: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """A tile of rows and of one block's columns."""
    block, first = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64) * BLOCK_M
    row, column = tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_M, inside_N = row < rows - first, column < Z
    a = hidden + block * T + first * hidden_row
    b = weight + block * weight_block + tl.program_id(1).to(tl.int64) * BLOCK_N * weight_row
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc += tl.load(bias + block * Z + column, mask=inside_N, other=0.0).to(tl.float32)[None, :]
    acc = matmul(acc, a, hidden_row, inside_M, b, weight_row, inside_N, T, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, WIDEN)
    inside = inside_M[:, None] & inside_N[None, :]
    source = x + first * x_row + (row[:, None] * x_row + column[None, :])
    acc *= tl.load(source, mask=inside, other=0.0).to(tl.float32)
    target = out + (first * out_row + block * out_block) + (row[:, None] * out_row + column[None, :])
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def block_gemm_kernel(
    masked: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    masked_row: tl.tensor,
    masked_block: tl.tensor,
    weight_block: tl.tensor,
    weight_row: tl.tensor,
    out_row: tl.tensor,
    eps: tl.tensor,
    Z: tl.constexpr,
    H: tl.constexpr,
    KIND: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """A tile of one block's whole rows."""
    block, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * BLOCK_M
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside_M, inside_N = row < rows - first, column < H
    a, b = masked + first * masked_row + block * masked_block, weight + block * weight_block
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if bias is not None:
        y += tl.load(bias + block * H + column, mask=inside_N, other=0.0).to(tl.float32)[None, :]
    y = matmul(y, a, masked_row, inside_M, b, weight_row, inside_N, Z, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, WIDEN)
    if KIND != "none":
        # columns that do not exist are 0, or NaN beside an infinity that makes the whole row NaN anyway
        y = normalize(y, inside_N[None, :], H, eps, 0.0, 1.0, KIND)
    if scale is not None:
        y *= tl.load(scale + block * H + column, mask=inside_N, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        y += tl.load(shift + block * H + column, mask=inside_N, other=0.0).to(tl.float32)[None, :]
    if RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    target = out + (first * out_row + block * H) + (row[:, None] * out_row + column[None, :])
    tl.store(target, y.to(out.dtype.element_ty), mask=inside_M[:, None] & inside_N[None, :])
