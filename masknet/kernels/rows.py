"""Row-wise normalizations inside a kernel: x̂ of a tile whose last axis is a row, and the gradients through it.

A tile is padded to powers of 2. `inside` marks the entries that exist; x is 0 where it is not. n is how many entries of
a row exist, `extra` a tile that broadcasts to x, or a scalar, and KIND one of KINDS. Everything is fp32. The formulas
are those of `masknet.norms`. What a gradient shares with x̂ is written again: the compiler merges equal operations.
"""

import triton
import triton.language as tl

KINDS = ("layer", "rms", "l1", "dyt", "bhyt", "affine", "variance_only", "seednorm")


@triton.jit
def load(pointers: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """What is there in fp32, and 0 outside."""
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_sum(out: tl.tensor, tile: tl.tensor, width: tl.constexpr, columns: tl.tensor, exists: tl.tensor) -> None:
    """Put the sum of a tile's rows into this program's row of out [programs, width], if there is one."""
    if out is not None:
        tl.store(out + tl.program_id(0) * width + columns, tl.sum(tile, 0, keep_dims=True), mask=exists)


@triton.jit
def mean(x: tl.tensor, n: tl.constexpr) -> tl.tensor:
    """Mean over the last axis, kept as an axis of 1."""
    return tl.sum(x, len(x.shape) - 1, keep_dims=True) * (1.0 / n)


@triton.jit
def centred(x: tl.tensor, inside: tl.tensor, n: tl.constexpr) -> tl.tensor:
    """x − mean(x). The second pass takes away what rounding left in the mean: ±1e-3 in a row of 1e4, where std is 0."""
    x = tl.where(inside, x - mean(x, n), 0.0)
    return tl.where(inside, x - mean(x, n), 0.0)


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """tanh by exp, exact at ±∞, NaN at NaN; near 0, where 1 − e would cancel, by its series to x⁹."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = x * (1.0 - s * (0.33333334 - s * (0.13333334 - s * (0.053968254 - s * 0.021869488))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def inverse_scale(x: tl.tensor, inside: tl.tensor, n: tl.constexpr, eps: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """What a row is multiplied by: one over its deviation or its root mean square."""
    if KIND == "layer" or KIND == "variance_only" or KIND == "l1":
        x = centred(x, inside, n)
    return 1.0 / (mean(tl.abs(x), n) + eps) if KIND == "l1" else tl.rsqrt(mean(x * x, n) + eps)


@triton.jit
def normalize(
    x: tl.tensor,
    inside: tl.tensor,
    n: tl.constexpr,
    eps: tl.tensor,
    extra: tl.tensor,
    constant: tl.tensor,
    KIND: tl.constexpr,
) -> tl.tensor:
    """x̂, 0 in a row's padding; for "seednorm" x over its root mean square."""
    if KIND == "dyt":
        x = tanh(extra * x)
    elif KIND == "affine":
        x = x - extra
    elif KIND == "bhyt":
        x = tanh(x * inverse_scale(x, inside, n, eps, KIND) * (extra / constant))
    elif KIND == "layer" or KIND == "l1":
        x = centred(x, inside, n) * inverse_scale(x, inside, n, eps, KIND)
    else:
        x = x * inverse_scale(x, inside, n, eps, KIND)
    return x


@triton.jit
def normalize_backward(
    g: tl.tensor,
    x: tl.tensor,
    inside: tl.tensor,
    n: tl.constexpr,
    eps: tl.tensor,
    extra: tl.tensor,
    constant: tl.tensor,
    KIND: tl.constexpr,
) -> tl.tensor:
    """The gradient of x, where g is that of x̂ and 0 outside."""
    if KIND == "dyt":
        y = tanh(extra * x)
        g = g * (1.0 - y * y) * extra
    elif KIND != "affine":
        inverse = inverse_scale(x, inside, n, eps, KIND)
        y = x * inverse
        if KIND == "bhyt":
            bounded = tanh(y * (extra / constant))
            g = g * (1.0 - bounded * bounded) * (extra / constant)
        direction = y  # the deviation's or root mean square's gradient, but for its size
        if KIND == "layer" or KIND == "variance_only" or KIND == "l1":
            direction = centred(x, inside, n) * inverse
        if KIND == "layer" or KIND == "l1":
            y = direction
        product = mean(g * y, n)
        if KIND == "l1":
            direction = tl.where(y > 0, 1.0, tl.where(y < 0, -1.0, 0.0))
            direction = direction - mean(direction, n)
        if KIND == "layer" or KIND == "l1":
            g = g - mean(g, n)
        g = (g - direction * product) * inverse
    return g


@triton.jit
def extra_backward(
    g: tl.tensor,
    x: tl.tensor,
    inside: tl.tensor,
    n: tl.constexpr,
    eps: tl.tensor,
    extra: tl.tensor,
    constant: tl.tensor,
    KIND: tl.constexpr,
) -> tl.tensor:
    """What each entry adds to the gradient of `extra`, for "dyt", "bhyt" and "affine"; g is the gradient of x̂."""
    y = normalize(x, inside, n, eps, extra, constant, KIND)
    if KIND == "dyt":
        g = g * (1.0 - y * y) * x
    elif KIND == "bhyt":
        g = g * (1.0 - y * y) * x * (inverse_scale(x, inside, n, eps, KIND) / constant)
    else:
        g = -g
    return g
