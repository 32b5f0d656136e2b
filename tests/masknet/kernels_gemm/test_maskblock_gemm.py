"""The serving products against their formulas in fp64, with eager torch's error as the measure of theirs.

Legend: N candidates, K blocks, t aggregation width, Z width of what is masked, h block width.
"""

from collections.abc import Callable

import pytest
import torch

from masknet.kernels.limits import align_rows
from masknet.kernels.maskblock_gemm import block_gemm, mask_project

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-3
KINDS = ["none", "rms", "l1"]
# The share of a result's largest entry by which it may be wrong where eager is right by luck. fp32: up to 40 pieces of
# a sum, each rounded. bf16: a unit in the last place, for the interpreter cuts where compiled code rounds. fp16: half.
FLOOR = {torch.float32: 2**-21, torch.bfloat16: 2**-7, torch.float16: 2**-11}
NUMPY = "ignore:invalid value encountered:RuntimeWarning"  # the interpreter's, of ∞ · 0 and ∞ − ∞
dtypes = pytest.mark.parametrize("dtype", list(FLOOR), ids=lambda dtype: str(dtype)[6:])
# N, K, t, Z and N, K, Z, h: each of the tiles, and widths that fill them or do not
PROJECT_SHAPES = [(1, 3, 50, 10), (2, 1, 7, 1), (63, 3, 16, 10), (70, 1, 130, 40)]
LARGE_PROJECT_SHAPES = [(500, 1, 24, 390), (600, 2, 40, 130)]
BLOCK_SHAPES = [(1, 3, 10, 1), (2, 1, 390, 512), (63, 3, 10, 200), (20, 1, 64, 16)]
LARGE_BLOCK_SHAPES = [(500, 1, 33, 10), (600, 1, 33, 400)]

Inputs = list[torch.Tensor | None]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def project_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """hidden, weight, bias, x."""
    torch.manual_seed(0)
    N, K, t, Z = shape
    return [normal(N, K * t, dtype=dtype), normal(K, Z, t, dtype=dtype), normal(K, Z), normal(N, Z, dtype=dtype)]


def projected(dtype: torch.dtype, *inputs: torch.Tensor) -> torch.Tensor:
    """mask_project by its formula in one precision."""
    hidden, weight, bias, x = (each.to(dtype) for each in inputs)
    mask = torch.stack([a @ w.T + b for a, w, b in zip(hidden.chunk(len(weight), 1), weight, bias, strict=True)], 1)
    return mask * x[:, None]


def block_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Inputs:
    """masked, weight, bias, scale, shift."""
    torch.manual_seed(0)
    N, K, Z, h = shape
    masked, weight = normal(N, K, Z, dtype=dtype), normal(K, h, Z, dtype=dtype)
    return [masked, weight, normal(K, h), normal(K, h), normal(K, h)]


def core(z: torch.Tensor, kind: str) -> torch.Tensor:
    """x̂ over the last axis."""
    centred = z - z.mean(-1, keepdim=True)
    if kind == "l1":
        return centred / (centred.abs().mean(-1, keepdim=True) + EPS)
    return z / (z.square().mean(-1, keepdim=True) + EPS).sqrt() if kind == "rms" else z


def blocks(dtype: torch.dtype, kind: str, activation: str, inputs: Inputs) -> torch.Tensor:
    """block_gemm by its formula: the product in one precision, the norm in fp32 or, for fp64, in that."""
    masked, weight, bias, scale, shift = (None if x is None else x.to(dtype) for x in inputs)
    z = torch.stack([x @ w.T for x, w in zip(masked.unbind(1), weight, strict=True)], 1)
    z = z if bias is None else z + bias
    y = core(z.to(torch.promote_types(dtype, torch.float32)), kind).to(dtype)
    y = y if scale is None else y * scale
    y = y if shift is None else y + shift
    return (y.relu() if activation == "relu" else y).flatten(1)


def assert_as_exact_as_eager(
    ours: torch.Tensor, by_formula: Callable[[torch.dtype], torch.Tensor], terms: int = 64
) -> None:
    """At most twice the error of the formula in the same precision, and the floor.

    A kernel adds the `terms` of a sum one after the other, each with a rounding of fp32, and so does cuBLAS, but for a
    single row, which it adds in a tree: √terms roundings are the floor where that is more.
    """
    exact, theirs = by_formula(torch.float64), by_formula(ours.dtype)
    assert ours.shape == exact.shape
    allowed = (
        2 * (theirs.double() - exact).abs().max() + max(FLOOR[ours.dtype], 2**-24 * terms**0.5) * exact.abs().max()
    )
    error = (ours.double() - exact).abs().max()
    assert error <= allowed, f"{error:.3g} above {allowed:.3g}"


@dtypes
@pytest.mark.parametrize("shape", PROJECT_SHAPES, ids=str)
def test_mask_project(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = project_inputs(shape, dtype)
    ours = mask_project(*inputs)
    assert ours.dtype == dtype
    assert ours.stride(1) % 16 == 0  # what block_gemm reads 16 bytes at a time
    assert_as_exact_as_eager(ours, lambda precision: projected(precision, *inputs))


@pytest.mark.parametrize("shape", LARGE_PROJECT_SHAPES, ids=str)
def test_mask_project_in_the_tiles_for_many_rows(shape: tuple[int, ...]) -> None:
    inputs = project_inputs(shape)
    assert_as_exact_as_eager(mask_project(*inputs), lambda precision: projected(precision, *inputs))


@dtypes
@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
def test_block_gemm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = block_inputs(shape, dtype)
    ours = block_gemm(*inputs, "rms", EPS, "relu")
    assert ours.dtype == dtype
    assert_as_exact_as_eager(ours, lambda precision: blocks(precision, "rms", "relu", inputs))


@pytest.mark.parametrize("shape", LARGE_BLOCK_SHAPES, ids=str)
def test_block_gemm_in_the_tiles_for_many_rows(shape: tuple[int, ...]) -> None:
    inputs = block_inputs(shape)
    ours = block_gemm(*inputs, "rms", EPS, "relu")
    assert_as_exact_as_eager(ours, lambda precision: blocks(precision, "rms", "relu", inputs))


@dtypes
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, activation: str, dtype: torch.dtype) -> None:
    inputs = block_inputs((17, 2, 40, 25), dtype)
    ours = block_gemm(*inputs, kind, EPS, activation)
    assert_as_exact_as_eager(ours, lambda precision: blocks(precision, kind, activation, inputs))


@pytest.mark.parametrize("missing", [(2,), (3,), (4,), (2, 3, 4)], ids=str)
def test_vectors_may_be_left_out(missing: tuple[int, ...]) -> None:
    inputs = block_inputs((5, 2, 10, 20))
    inputs = [None if i in missing else x for i, x in enumerate(inputs)]
    ours = block_gemm(*inputs, "rms", EPS, "none")
    assert_as_exact_as_eager(ours, lambda precision: blocks(precision, "rms", "none", inputs))


def test_a_row_far_from_zero_keeps_its_spread() -> None:
    inputs = block_inputs((9, 2, 10, 100))
    inputs[2] += 1e4
    inputs[3:5] = None, None
    ours = block_gemm(*inputs, "l1", EPS, "none")
    assert_as_exact_as_eager(ours, lambda precision: blocks(precision, "l1", "none", inputs))


@pytest.mark.filterwarnings(NUMPY)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_goes_where_eager_torch_sends_it(kind: str, value: float) -> None:
    inputs = block_inputs((20, 2, 10, 25))
    inputs[0][3, 1, 4] = value
    ours = block_gemm(*inputs, kind, EPS, "relu")
    exact = blocks(torch.float64, kind, "relu", inputs)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert ours[:3].isfinite().all()


@pytest.mark.filterwarnings(NUMPY)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", range(4), ids=["hidden", "weight", "bias", "x"])
def test_what_is_not_finite_goes_through_the_mask(place: int, value: float) -> None:
    inputs = project_inputs((5, 2, 20, 25))
    inputs[place].view(-1)[7] = value
    ours, exact = mask_project(*inputs), projected(torch.float64, *inputs)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4, equal_nan=True)


def scattered(x: torch.Tensor) -> torch.Tensor:
    """x in every second entry of a buffer."""
    return torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)[..., ::2].copy_(x)


def sliced(x: torch.Tensor) -> torch.Tensor:
    """x in the middle of wider rows."""
    return torch.zeros(*x.shape[:-1], x.shape[-1] + 8, dtype=x.dtype, device=x.device)[..., 3:-5].copy_(x)


@pytest.mark.parametrize("layout", [scattered, sliced, align_rows])
def test_strides_make_no_difference(layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    inputs, block = project_inputs((20, 2, 30, 25)), block_inputs((20, 2, 10, 25))
    arguments = "l1", EPS, "relu"
    assert torch.equal(mask_project(*map(layout, inputs)), mask_project(*inputs))
    assert torch.equal(block_gemm(*map(layout, block), *arguments), block_gemm(*block, *arguments))


def test_expanded_rows_and_transposed_weights() -> None:
    hidden, weight, bias, x = project_inputs((1, 2, 30, 25))
    one = mask_project(hidden, weight, bias, x)
    transposed = weight.transpose(1, 2).contiguous().transpose(1, 2)
    three = mask_project(hidden.expand(3, -1), transposed, bias, x.expand(3, -1))
    assert torch.equal(three, one.expand(3, -1, -1))


def test_a_row_does_not_depend_on_the_others() -> None:
    inputs, block = project_inputs((40, 2, 30, 25)), block_inputs((40, 2, 10, 25))
    rows = slice(16, 18)  # the first of a tile: numpy, in the interpreter, rounds each place of a tile its own way
    few = mask_project(inputs[0][rows], *inputs[1:3], inputs[3][rows])
    assert torch.equal(few, mask_project(*inputs)[rows])
    few = block_gemm(block[0][rows], *block[1:], "rms", EPS, "relu")
    assert torch.equal(few, block_gemm(*block, "rms", EPS, "relu")[rows])


def test_no_rows() -> None:
    assert mask_project(*project_inputs((0, 3, 5, 7))).shape == (0, 3, 7)
    assert block_gemm(*block_inputs((0, 3, 5, 7)), "rms", EPS, "relu").shape == (0, 21)


def test_aligned_rows_hold_the_same_values() -> None:
    weight = normal(2, 3, 17)
    aligned = align_rows(weight)
    assert torch.equal(aligned, weight)
    assert aligned.stride() == (96, 32, 1)


PROJECT, BLOCK = project_inputs((2, 2, 3, 5)), block_inputs((2, 2, 3, 5))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({0: PROJECT[0].double(), 1: PROJECT[1].double()}, TypeError, "hidden must be .* not torch.float64"),
        ({2: PROJECT[2].double()}, TypeError, "bias must be .* not torch.float64"),
        ({1: PROJECT[1].bfloat16()}, TypeError, "one type"),
        ({0: normal(2, 7)}, ValueError, r"hidden must have shape \(2, 6\)"),
        ({2: normal(5)}, ValueError, r"bias must have shape \(2, 5\)"),
        ({3: normal(2, 4)}, ValueError, r"x must have shape \(2, 5\)"),
        ({3: normal(1, 5)}, ValueError, r"x must have shape \(2, 5\)"),
    ],
)
def test_mask_project_refuses(changed: dict[int, torch.Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mask_project(*(changed.get(i, x) for i, x in enumerate(PROJECT)))


@pytest.mark.parametrize(
    ("changed", "kind", "activation", "error", "message"),
    [
        (
            {0: BLOCK[0].double(), 1: BLOCK[1].double()},
            "rms",
            "relu",
            TypeError,
            "masked must be .* not torch.float64",
        ),
        ({1: BLOCK[1].half()}, "rms", "relu", TypeError, "one type"),
        ({1: normal(2, 513, 3)}, "rms", "relu", ValueError, "more than 512 do not fit"),
        ({0: normal(2, 2, 4)}, "rms", "relu", ValueError, r"masked must have shape \(2, 2, 3\)"),
        ({3: normal(5)}, "rms", "relu", ValueError, r"scale must have shape \(2, 5\)"),
        ({}, "layer", "relu", ValueError, "kind must be one of none, rms"),
        ({}, "rms", "gelu", ValueError, "activation must be none or relu"),
    ],
)
def test_block_gemm_refuses(
    changed: dict[int, torch.Tensor], kind: str, activation: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        block_gemm(*(changed.get(i, x) for i, x in enumerate(BLOCK)), kind, EPS, activation)


class Blocks(torch.nn.Module):
    """Both products, one after the other."""

    def forward(self, hidden_NT: torch.Tensor, x_NZ: torch.Tensor) -> torch.Tensor:
        """[N, K·h]."""
        masked_NKZ = mask_project(hidden_NT, *PROJECT[1:3], x_NZ)
        return block_gemm(masked_NKZ, BLOCK_OF_5, *BLOCK[2:], "rms", EPS, "relu")


BLOCK_OF_5 = normal(2, 5, 5)


def test_registration() -> None:
    torch.library.opcheck(mask_project, tuple(PROJECT))
    torch.library.opcheck(block_gemm, (*BLOCK, "rms", EPS, "relu"))


def test_compiled_and_exported_for_any_number_of_rows() -> None:
    network, rows = Blocks(), torch.export.Dim("rows", min=2)
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="aot_eager")
    exported = torch.export.export(network, (PROJECT[0], PROJECT[3]), dynamic_shapes=({0: rows}, {0: rows})).module()
    hidden, x = normal(7, 6), normal(7, 5)
    expected = network(hidden, x)
    assert torch.equal(compiled(hidden, x), expected)
    assert torch.equal(exported(hidden, x), expected)
