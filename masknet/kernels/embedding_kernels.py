"""The kernels of `embedding_norm_mask`: LN_EMB and the mask in one pass.

Legend: B rows, F fields, d embedding width; a tile is [ROWS, BLOCK_F, BLOCK_D].
"""

import triton
import triton.language as tl

from masknet.kernels.rows import extra_backward, load, normalize, normalize_backward, store_sum


@triton.jit
def load_extra(
    extra: tl.tensor, fields: tl.tensor, columns: tl.tensor, inside: tl.tensor, F: tl.constexpr, KIND: tl.constexpr
) -> tl.tensor:
    """The kind's own parameter: a scalar per field, or one per channel; 0, which does nothing, where there is none."""
    tile = tl.zeros((1, 1, 1), tl.float32)
    if extra is not None:
        tile = load(extra + fields, fields < F) if KIND == "dyt" or KIND == "bhyt" else load(extra + columns, inside)
    return tile


@triton.jit(do_not_specialize=["B"])  # not a kernel for each batch size
def forward_kernel(
    x: tl.tensor,
    mask: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    extra: tl.tensor,
    out: tl.tensor,
    B: tl.tensor,
    eps: tl.tensor,
    constant: tl.tensor,
    X_STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
    F: tl.constexpr,
    d: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One tile; grid (tiles of rows, tiles of fields)."""
    fields = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :, None]
    column = tl.arange(0, BLOCK_D)[None, None, :]
    columns, exists = fields * d + column, (fields < F) & (column < d)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None, None]
    inside = exists & (rows < B)
    rows = rows.to(tl.int64)
    x_tile = load(x + rows * X_STRIDE + columns, inside)
    mask_tile = load(mask + rows * MASK_STRIDE + columns, inside)
    y = normalize(x_tile, inside, d, eps, load_extra(extra, fields, columns, exists, F, KIND), constant, KIND)
    if weight is not None:
        y = y * load(weight + columns, exists)
    if bias is not None:
        y = y + load(bias + columns, exists)
    tl.store(out + rows * (F * d) + columns, (mask_tile * y).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B"])
def backward_kernel(
    dout: tl.tensor,
    x: tl.tensor,
    mask: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    extra: tl.tensor,
    dx: tl.tensor,
    dmask: tl.tensor,
    dweight: tl.tensor,
    dbias: tl.tensor,
    dextra: tl.tensor,
    B: tl.tensor,
    eps: tl.tensor,
    constant: tl.tensor,
    DOUT_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
    F: tl.constexpr,
    d: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A program loops over tiles of rows of its fields; its sums of parameters' gradients are a row of [programs, D].

    Grid (programs, tiles of fields).
    """
    fields = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :, None]
    column = tl.arange(0, BLOCK_D)[None, None, :]
    columns, exists = fields * d + column, (fields < F) & (column < d)
    extra_tile = load_extra(extra, fields, columns, exists, F, KIND)
    if weight is not None:
        weight_tile = load(weight + columns, exists)
    if bias is not None:
        bias_tile = load(bias + columns, exists)
    dweight_sum = tl.zeros((ROWS, BLOCK_F, BLOCK_D), tl.float32)
    dbias_sum = tl.zeros((ROWS, BLOCK_F, BLOCK_D), tl.float32)
    dextra_sum = tl.zeros((ROWS, BLOCK_F, BLOCK_D), tl.float32)
    tile = tl.program_id(0)
    while tile < tl.cdiv(B, ROWS):
        rows = (tile * ROWS + tl.arange(0, ROWS))[:, None, None]
        inside = exists & (rows < B)
        rows = rows.to(tl.int64)
        x_tile = load(x + rows * X_STRIDE + columns, inside)
        dout_tile = load(dout + rows * DOUT_STRIDE + columns, inside)
        g = dout_tile * load(mask + rows * MASK_STRIDE + columns, inside)
        y = normalize(x_tile, inside, d, eps, extra_tile, constant, KIND)
        dbias_sum += g
        dweight_sum += g * y
        if weight is not None:
            g, y = g * weight_tile, y * weight_tile
        if bias is not None:
            y = y + bias_tile
        tl.store(dmask + rows * (F * d) + columns, (dout_tile * y).to(dmask.dtype.element_ty), mask=inside)
        if extra is not None:
            dextra_sum += extra_backward(g, x_tile, inside, d, eps, extra_tile, constant, KIND)
        g = normalize_backward(g, x_tile, inside, d, eps, extra_tile, constant, KIND)
        tl.store(dx + rows * (F * d) + columns, g.to(dx.dtype.element_ty), mask=inside)
        tile += tl.num_programs(0)
    store_sum(dweight, dweight_sum, F * d, columns, exists)
    store_sum(dbias, dbias_sum, F * d, columns, exists)
    store_sum(dextra, dextra_sum, F * d, columns, exists)
