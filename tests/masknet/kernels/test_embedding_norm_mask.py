"""The fused embedding norm and mask against its formula in fp64: output and every gradient.

Legend: B rows, F fields, d embedding width, D = F·d.
"""

from itertools import product

import pytest
import torch

from masknet.kernels.embedding_norm_mask import embedding_norm_mask
from masknet.kernels.launch import Tile, tile_of
from masknet.kernels.rows import KINDS
from tests.masknet.kernels.reference import (
    DEVICE,
    DTYPES,
    EPS,
    KAPPA,
    ROWS,
    Inputs,
    assert_as_exact_as_eager,
    assert_finite_alike,
    double,
    norm,
    run,
)

kinds = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "seednorm"])
# of x, of the mask, of the parameters
PRECISIONS = [(dtype, dtype, torch.float32) for dtype in DTYPES] + [
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.float16, torch.float16, torch.bfloat16),
]
SHAPES = [(1, 39, 1), (2, 22, 2), (63, 1, 8), (500, 1, 10), (63, 3, 16), (2, 5, 64)]

ALL_SHAPES = [*product((1, 2, 63), (1, 22, 39), (1, 2, 8, 10, 16, 64)), (500, 22, 10), (500, 39, 16)]


def make_inputs(
    shape: tuple[int, int, int], kind: str, rows: str = "normal", precision: tuple[torch.dtype, ...] = PRECISIONS[0]
) -> list[torch.Tensor | None]:
    """x, mask, weight, bias, extra."""
    B, F, d = shape
    torch.manual_seed(0)
    x, mask = ROWS[rows](B, F, d).to(precision[0]), torch.randn(B, F * d).to(precision[1])
    shapes = {"dyt": (F, 1), "bhyt": (F, 1), "affine": (F, d)}
    extra = torch.rand(shapes[kind]) + 0.5 if kind in shapes else None
    parameters = [
        None if each is None else each.to(precision[2]) for each in (torch.randn(F, d), torch.randn(F, d), extra)
    ]
    return [None if each is None else each.to(DEVICE) for each in (x, mask, *parameters)]


def fused(kind: str, x: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = embedding_norm_mask(x, *others, kind, EPS, KAPPA)
    return out


def eager(kind: str, x: torch.Tensor, mask: torch.Tensor, *parameters: torch.Tensor | None) -> torch.Tensor:
    return mask * norm(x, *parameters, kind).flatten(1)


def compare(kind: str, inputs: Inputs, dout: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Hold the kernels against fp64; returns what they gave."""
    if dout is None:
        dout = torch.randn(inputs[1].shape, device=DEVICE).to(torch.promote_types(inputs[0].dtype, inputs[1].dtype))
    got = run(lambda *leaves: fused(kind, *leaves), inputs, dout)
    theirs = run(lambda *leaves: eager(kind, *leaves), inputs, dout)
    exact = run(lambda *leaves: eager(kind, *leaves), double(inputs), dout)
    assert_as_exact_as_eager(got, theirs, exact)
    return got


@kinds
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: "-".join(str(dtype)[6:] for dtype in p))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape: tuple[int, int, int], precision: tuple[torch.dtype, ...], kind: str) -> None:
    compare(kind, make_inputs(shape, kind, precision=precision))


@pytest.mark.parametrize("kind", ["layer", "bhyt"])
def test_wide_fields(kind: str) -> None:
    compare(kind, make_inputs((3, 2, 1000), kind))


@pytest.mark.long
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ALL_SHAPES, ids=str)
def test_all_shapes(shape: tuple[int, int, int], dtype: torch.dtype, kind: str) -> None:
    compare(kind, make_inputs(shape, kind, precision=(dtype, dtype, torch.float32)))


@kinds
@pytest.mark.parametrize("rows", [name for name in ROWS if name != "normal"])
@pytest.mark.parametrize("width", [2, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unusual_rows(dtype: torch.dtype, width: int, rows: str, kind: str) -> None:
    compare(kind, make_inputs((20, 3, width), kind, rows, (dtype, dtype, torch.float32)))


@kinds
@pytest.mark.parametrize("missing", [(2,), (3,), (2, 3)], ids=["weight", "bias", "weight and bias"])
def test_without_parameters(missing: tuple[int, ...], kind: str) -> None:
    inputs = make_inputs((7, 3, 10), kind)
    compare(kind, [None if i in missing else x for i, x in enumerate(inputs)])


def test_affine_without_a_centre() -> None:
    compare("affine", [*make_inputs((7, 3, 10), "affine")[:4], None])


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("place", [0, 1], ids=["x", "mask"])
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # numpy on ∞ · 0, in the interpreter
def test_nan_and_inf_go_where_eager_sends_them(place: int, value: float, kind: str) -> None:
    inputs = make_inputs((5, 3, 10), kind)
    inputs[place].view(5, 3, 10)[2, 1, 4] = value
    dout = torch.randn(5, 30, device=DEVICE)
    got = run(lambda *leaves: fused(kind, *leaves), inputs, dout)
    theirs = run(lambda *leaves: eager(kind, *leaves), inputs, dout)
    assert not all(tensor.isfinite().all() for tensor in theirs)
    assert_finite_alike(got, theirs)


@pytest.mark.parametrize("kind", ["layer", "bhyt"])
def test_any_strides(kind: str) -> None:
    inputs = make_inputs((6, 3, 10), kind)
    x, mask, weight = inputs[:3]
    dout = torch.randn(6, 30, device=DEVICE)
    expected = run(lambda *leaves: fused(kind, *leaves), inputs, dout)
    wide = torch.randn(6, 77, device=DEVICE)
    wide[:, 5:35], wide[:, 40:70] = mask, x.flatten(1)
    strided = [
        [x.transpose(0, 1).contiguous().transpose(0, 1), mask.t().contiguous().t(), weight.t().contiguous().t()],
        [wide[:, 40:70].unflatten(1, (3, 10)), wide[:, 5:35], weight],
        [torch.cat([x, x], 2)[..., :10], mask, weight],
        [torch.cat([x, x], 1)[:, :3], torch.cat([mask, mask], 1)[:, :30], weight],
    ]
    for changed in strided:
        for dout_ in (dout, dout.t().contiguous().t(), torch.cat([dout, dout], 1)[:, 30:]):
            got = run(lambda *leaves: fused(kind, *leaves), [*changed, *inputs[3:]], dout_)
            assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", ["layer", "dyt"])
def test_one_row_and_one_gradient_expanded(kind: str) -> None:
    x, mask, *parameters = make_inputs((6, 3, 10), kind)
    inputs = [x[:1].expand(6, 3, 10), mask[:1].expand(6, 30), *parameters]
    compare(kind, inputs, torch.randn(30, device=DEVICE).expand(6, 30))
    compare(kind, inputs, torch.randn((), device=DEVICE).expand(6, 30))


@pytest.mark.long  # 4 GiB of addresses, of which a few pages are touched
def test_rows_beyond_32_bit_offsets() -> None:
    inputs = make_inputs((5, 2, 8), "layer", precision=(torch.float16, torch.float16, torch.float32))
    far = torch.empty(4 * 2**29 + 16, dtype=torch.float16, device=DEVICE).as_strided((5, 2, 8), (2**29, 8, 1))
    far.copy_(inputs[0])
    dout = torch.randn(5, 16, device=DEVICE).half()
    expected = run(lambda *leaves: fused("layer", *leaves), inputs, dout)
    got = run(lambda *leaves: fused("layer", *leaves), [far, *inputs[1:]], dout)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@kinds
def test_an_empty_batch_has_gradients_of_zero(kind: str) -> None:
    inputs = make_inputs((0, 3, 10), kind)
    out, dx, dmask, *grads = run(lambda *leaves: fused(kind, *leaves), inputs, torch.empty(0, 30, device=DEVICE))
    assert (out.shape, dx.shape, dmask.shape) == ((0, 30), (0, 3, 10), (0, 30))
    for grad, parameter in zip(grads, (x for x in inputs[2:] if x is not None), strict=True):
        assert torch.equal(grad, torch.zeros_like(parameter))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "x is torch.float64", {0: torch.zeros(4, 3, 10, dtype=torch.float64)}),
        (TypeError, "bias is torch.float64", {3: torch.zeros(3, 10, dtype=torch.float64)}),
        (ValueError, r"x has shape \(4, 30\)", {0: torch.zeros(4, 30)}),
        (ValueError, r"mask has shape \(4, 20\)", {1: torch.zeros(4, 20)}),
        (ValueError, r"weight has shape \(10,\)", {2: torch.zeros(10)}),
        (ValueError, r"extra has shape \(3, 10\)", {4: torch.zeros(3, 10)}),
        (ValueError, "dyt needs extra", {4: None}),
        (ValueError, "rms has no extra", {4: torch.zeros(3, 10), 5: "rms"}),
        (ValueError, "kind 'batch' is none of", {4: None, 5: "batch"}),
        (ValueError, "seednorm is for hidden", {4: None, 5: "seednorm"}),
        (ValueError, "eps 0.0 is not positive", {6: 0.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(error: type[Exception], message: str, change: dict[int, object]) -> None:
    arguments = [*make_inputs((4, 3, 10), "dyt"), "dyt", EPS, KAPPA]
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(error, match=message):
        embedding_norm_mask(*arguments)


@pytest.mark.parametrize(
    ("fields", "width", "tile"),
    [
        (39, 10, Tile(16, 8, 16, 4)),  # 40 fields of 39, where blocks of 32 would take 64
        (22, 16, Tile(16, 8, 16, 4)),
        (1, 16, Tile(128, 1, 16, 4)),
        (39, 1, Tile(32, 64, 1, 4)),
        (32, 16, Tile(4, 32, 16, 4)),
        (39, 64, Tile(32, 1, 64, 4)),
        (5, 4096, Tile(1, 1, 4096, 8)),
    ],
)
def test_tiles_waste_few_fields(fields: int, width: int, tile: Tile) -> None:
    assert tile_of(fields, width) == tile
