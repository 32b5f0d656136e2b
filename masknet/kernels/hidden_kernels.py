"""The kernels of `hidden_norm_act`: LN_HID, its activation and its dropout in one pass.

Legend: B rows, h width of a hidden vector; a tile is [ROWS, BLOCK_H].
"""

import triton
import triton.language as tl

from masknet.kernels.rows import extra_backward, load, normalize, normalize_backward, store_sum, tanh


@triton.jit
def load_extra(extra: tl.tensor, columns: tl.tensor, exists: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """The kind's own parameter: a scalar, or one per channel (of "seednorm" α); 0, which does nothing, for none."""
    tile = tl.zeros((1, 1), tl.float32)
    if extra is not None:
        tile = tl.load(extra).to(tl.float32) if KIND == "dyt" or KIND == "bhyt" else load(extra + columns, exists)
    return tile


@triton.jit
def dropout_scale(rows: tl.tensor, columns: tl.tensor, seed: tl.tensor, DROPOUT: tl.constexpr) -> tl.tensor:
    """0 for a dropped entry and 1 / (1 − p) for a kept one; the numbers are counted by row and column, 32 bits each."""
    random, _, _, _ = tl.philox(seed, columns, rows, 0, 0)
    return tl.where(tl.uint_to_uniform_float(random) >= DROPOUT, 1.0 / (1.0 - DROPOUT), 0.0)


@triton.jit(do_not_specialize=["B", "seed"])  # no kernel of its own for a size or a seed
def forward_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    extra: tl.tensor,
    out: tl.tensor,
    B: tl.tensor,
    eps: tl.tensor,
    constant: tl.tensor,
    seed: tl.tensor,
    X_STRIDE: tl.constexpr,
    h: tl.constexpr,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """One tile; grid (tiles of rows,)."""
    columns = tl.arange(0, BLOCK_H)[None, :]
    exists = columns < h
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = exists & (rows < B)
    x_tile = load(x + rows.to(tl.int64) * X_STRIDE + columns, inside)
    extra_tile = load_extra(extra, columns, exists, KIND)
    y = normalize(x_tile, inside, h, eps, extra_tile, constant, KIND)
    if KIND == "seednorm":
        gate = tanh(tl.sum(x_tile * load(extra + h + columns, exists), 1, keep_dims=True))
        y = y * (gate * extra_tile + load(weight + columns, exists))
    elif weight is not None:
        y = y * load(weight + columns, exists)
    if bias is not None:
        y = y + load(bias + columns, exists)
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if DROPOUT > 0:
        y = y * dropout_scale(rows, columns, seed, DROPOUT)
    tl.store(out + rows.to(tl.int64) * h + columns, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "seed"])
def backward_kernel(
    dout: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    extra: tl.tensor,
    dx: tl.tensor,
    dweight: tl.tensor,
    dbias: tl.tensor,
    dextra: tl.tensor,
    B: tl.tensor,
    eps: tl.tensor,
    constant: tl.tensor,
    seed: tl.tensor,
    DOUT_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    h: tl.constexpr,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """A program loops over tiles of rows; its sums of parameters' gradients are a row of [programs, h]."""
    columns = tl.arange(0, BLOCK_H)[None, :]
    exists = columns < h
    extra_tile = load_extra(extra, columns, exists, KIND)
    dweight_sum = tl.zeros((ROWS, BLOCK_H), tl.float32)
    dbias_sum = tl.zeros((ROWS, BLOCK_H), tl.float32)
    dextra_sum = tl.zeros((ROWS, BLOCK_H), tl.float32)
    dbeta_sum = tl.zeros((ROWS, BLOCK_H), tl.float32)
    tile = tl.program_id(0)
    while tile < tl.cdiv(B, ROWS):
        rows = (tile * ROWS + tl.arange(0, ROWS))[:, None]
        inside = exists & (rows < B)
        x_tile = load(x + rows.to(tl.int64) * X_STRIDE + columns, inside)
        g = load(dout + rows.to(tl.int64) * DOUT_STRIDE + columns, inside)
        y = normalize(x_tile, inside, h, eps, extra_tile, constant, KIND)
        scale = 1.0
        if weight is not None:
            scale = load(weight + columns, exists)
        if KIND == "seednorm":
            beta = load(extra + h + columns, exists)
            gate = tanh(tl.sum(x_tile * beta, 1, keep_dims=True))
            scale += gate * extra_tile
        if DROPOUT > 0:
            g = g * dropout_scale(rows, columns, seed, DROPOUT)
        if ACTIVATION == "relu":
            activated = y * scale
            if bias is not None:
                activated += load(bias + columns, exists)
            g = tl.where(activated <= 0, 0.0, g)
        dbias_sum += g
        dweight_sum += g * y
        if KIND == "seednorm":
            dextra_sum += g * y * gate
            dgate = tl.sum(g * y * extra_tile, 1, keep_dims=True) * (1.0 - gate * gate)
            dbeta_sum += dgate * x_tile
        g = g * scale
        if KIND == "dyt" or KIND == "bhyt" or KIND == "affine":
            dextra_sum += extra_backward(g, x_tile, inside, h, eps, extra_tile, constant, KIND)
        g = normalize_backward(g, x_tile, inside, h, eps, extra_tile, constant, KIND)
        if KIND == "seednorm":
            g += dgate * beta
        tl.store(dx + rows.to(tl.int64) * h + columns, g.to(dx.dtype.element_ty), mask=inside)
        tile += tl.num_programs(0)
    store_sum(dweight, dweight_sum, h, columns, exists)
    store_sum(dbias, dbias_sum, h, columns, exists)
    if KIND == "seednorm":
        store_sum(dextra, dextra_sum, 2 * h, columns, exists)
        store_sum(dextra, dbeta_sum, 2 * h, h + columns, exists)
    else:
        store_sum(dextra, dextra_sum, h, columns, exists)
