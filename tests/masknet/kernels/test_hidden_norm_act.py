"""The fused hidden norm, activation and dropout against its formula in fp64: output and every gradient.

Legend: B rows, h width.
"""

from itertools import product

import pytest
import torch

from masknet.kernels.hidden_norm_act import hidden_norm_act
from masknet.kernels.launch import RowTile, row_tile_of
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

kinds = pytest.mark.parametrize("kind", KINDS)
activations = pytest.mark.parametrize("activation", ["none", "relu"])
# of x, of the parameters
PRECISIONS = [*((dtype, torch.float32) for dtype in DTYPES), (torch.bfloat16, torch.float16)]
SHAPES = [(500, 1), (63, 8), (20, 200), (2, 400), (1, 512), (3, 1000)]


def make_inputs(
    shape: tuple[int, int], kind: str, rows: str = "normal", precision: tuple[torch.dtype, ...] = PRECISIONS[0]
) -> list[torch.Tensor | None]:
    """x, weight, bias, extra."""
    B, h = shape
    torch.manual_seed(0)
    x, weight, bias = ROWS[rows](B, h), torch.randn(h), torch.randn(h)
    shapes = {"dyt": (1,), "bhyt": (1,), "affine": (h,), "seednorm": (2, h)}
    extra = torch.rand(shapes[kind]) + 0.5 if kind in shapes else None
    if extra is not None and kind == "seednorm":
        extra[1] = torch.randn(h) / (h**0.5 * x.abs().max().clamp(min=1))  # x · β of about 1
    parameters = [None if each is None else each.to(precision[1]) for each in (weight, bias, extra)]
    return [None if each is None else each.to(DEVICE) for each in (x.to(precision[0]), *parameters)]


def fused(
    x: torch.Tensor, *parameters: torch.Tensor | None, kind: str, activation: str, dropout: float = 0.0, seed: int = 0
) -> torch.Tensor:
    out: torch.Tensor = hidden_norm_act(x, *parameters, kind, EPS, KAPPA, activation, dropout, seed)
    return out


def eager(x: torch.Tensor, *parameters: torch.Tensor | None, kind: str, activation: str) -> torch.Tensor:
    y = norm(x, *parameters, kind)
    return torch.relu(y) if activation == "relu" else y


def compare(kind: str, activation: str, inputs: Inputs, dout: torch.Tensor | None = None, **dropout: float) -> None:
    """Hold the kernels against fp64. At an output that rounding alone holds on one side of 0, dout is 0."""
    x = inputs[0]
    kept = dropped_entries(x, **dropout) if dropout else torch.ones((), device=DEVICE)
    if dout is None:
        dout = torch.randn(x.shape, device=DEVICE).to(x.dtype)
        dout *= eager(*double(inputs), kind=kind, activation="none").abs() > 1e-5
    got = run(lambda *leaves: fused(*leaves, kind=kind, activation=activation, **dropout), inputs, dout)
    theirs = run(lambda *leaves: (eager(*leaves, kind=kind, activation=activation) * kept).to(x.dtype), inputs, dout)
    exact = run(lambda *leaves: eager(*leaves, kind=kind, activation=activation) * kept, double(inputs), dout)
    assert_as_exact_as_eager(got, theirs, exact)


def dropped_entries(x: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """What dropout multiplies with: the output for a norm that is the identity, of ones."""
    ones = torch.ones(x.shape, device=DEVICE)
    return fused(ones, None, None, None, kind="affine", activation="none", dropout=dropout, seed=seed)


@kinds
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: "-".join(str(dtype)[6:] for dtype in p))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape: tuple[int, int], precision: tuple[torch.dtype, ...], kind: str) -> None:
    compare(kind, "relu", make_inputs(shape, kind, precision=precision))


@pytest.mark.long
@kinds
@activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*product((1, 2, 63), (1, 200, 400, 512, 1000)), (500, 400)], ids=str)
def test_all_shapes(shape: tuple[int, int], dtype: torch.dtype, activation: str, kind: str) -> None:
    compare(kind, activation, make_inputs(shape, kind, precision=(dtype, torch.float32)))


@kinds
@pytest.mark.parametrize("rows", [name for name in ROWS if name != "normal"])
@pytest.mark.parametrize("width", [2, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unusual_rows(dtype: torch.dtype, width: int, rows: str, kind: str) -> None:
    compare(kind, "relu", make_inputs((20, width), kind, rows, (dtype, torch.float32)))


@pytest.mark.parametrize("kind", ["layer", "seednorm", "dyt"])
def test_wide_rows(kind: str) -> None:
    compare(kind, "relu", make_inputs((3, 8192), kind))


@kinds
@activations
@pytest.mark.parametrize("missing", [(1,), (2,), (1, 2)], ids=["weight", "bias", "weight and bias"])
def test_without_parameters(missing: tuple[int, ...], activation: str, kind: str) -> None:
    if kind == "seednorm":
        missing = (2,)
    compare(kind, activation, [None if i in missing else x for i, x in enumerate(make_inputs((7, 50), kind))])


def test_tanh_to_a_few_units_in_the_last_place() -> None:
    size = torch.logspace(-8, 2, 2000, device=DEVICE)[None]
    for x in (size, -size):
        y = fused(x, None, None, torch.ones(1, device=DEVICE), kind="dyt", activation="none")
        torch.testing.assert_close(y.double(), x.double().tanh(), rtol=4 * 2**-23, atol=0)


def test_affine_without_a_centre() -> None:
    compare("affine", "relu", [*make_inputs((7, 50), "affine")[:3], None])


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # numpy on ∞ · 0, in the interpreter
@kinds
@activations
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_inf_go_where_eager_sends_them(value: float, activation: str, kind: str) -> None:
    inputs = make_inputs((5, 20), kind)
    inputs[0][2, 4] = value
    dout = torch.randn(5, 20, device=DEVICE)
    got = run(lambda *leaves: fused(*leaves, kind=kind, activation=activation), inputs, dout)
    theirs = run(lambda *leaves: eager(*leaves, kind=kind, activation=activation), inputs, dout)
    assert_finite_alike(got, theirs)


@pytest.mark.parametrize("kind", ["layer", "seednorm"])
def test_any_strides(kind: str) -> None:
    inputs = make_inputs((6, 30), kind)
    x, weight = inputs[:2]
    dout = torch.randn(6, 30, device=DEVICE)
    expected = run(lambda *leaves: fused(*leaves, kind=kind, activation="relu"), inputs, dout)
    wide = torch.randn(6, 77, device=DEVICE)
    wide[:, 7:37] = x
    for x_ in (x.t().contiguous().t(), wide[:, 7:37], torch.stack([x, x], 2)[..., 0]):
        for dout_ in (dout, dout.t().contiguous().t(), torch.cat([dout, dout], 1)[:, 30:]):
            changed = [x_, torch.stack([weight, weight], 1)[:, 0], *inputs[2:]]
            got = run(lambda *leaves: fused(*leaves, kind=kind, activation="relu"), changed, dout_)
            assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    one_row = [x[:1].expand(6, 30), *inputs[1:]]
    compare(kind, "relu", one_row, torch.randn(30, device=DEVICE).expand(6, 30))
    compare(kind, "relu", one_row, torch.randn((), device=DEVICE).expand(6, 30))


@kinds
def test_an_empty_batch_has_gradients_of_zero(kind: str) -> None:
    inputs = make_inputs((4, 20), kind)
    inputs[0] = inputs[0][:0]
    dout = torch.empty(0, 20, device=DEVICE)
    out, dx, *grads = run(lambda *leaves: fused(*leaves, kind=kind, activation="relu"), inputs, dout)
    assert out.shape == dx.shape == (0, 20)
    for grad, parameter in zip(grads, (x for x in inputs[1:] if x is not None), strict=True):
        assert torch.equal(grad, torch.zeros_like(parameter))


@kinds
@activations
def test_dropout_is_the_same_in_both_passes(activation: str, kind: str) -> None:
    compare(kind, activation, make_inputs((40, 50), kind), dropout=0.3, seed=2**40 + 5)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_scales_it(dropout: float) -> None:
    kept = dropped_entries(torch.empty(300, 200), dropout, seed=1)
    assert torch.equal(kept[kept != 0], torch.full_like(kept[kept != 0], 1 / (1 - dropout)))
    share = (kept != 0).double().mean().item()
    assert abs(share - (1 - dropout)) < 5 * (dropout * (1 - dropout) / kept.numel()) ** 0.5
    # rows and columns each drop their own entries: neighbours agree as often as chance has it
    agree = (1 - dropout) ** 2 + dropout**2
    for one, other in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1])):
        assert abs(((one != 0) == (other != 0)).double().mean().item() - agree) < 5 * (0.25 / one.numel()) ** 0.5


def test_dropout_by_seed() -> None:
    x = torch.empty(60, 50)
    first = dropped_entries(x, 0.5, seed=1)
    assert torch.equal(dropped_entries(x, 0.5, seed=1), first)
    assert torch.equal(dropped_entries(x[:7], 0.5, seed=1), first[:7])  # a row's does not depend on the batch
    for seed in (2, 2**32 + 1, 2**62 + 1):
        assert 0.4 < ((dropped_entries(x, 0.5, seed=seed) != 0) == (first != 0)).double().mean() < 0.6


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "x is torch.float64", {0: torch.zeros(4, 10, dtype=torch.float64)}),
        (ValueError, r"x has shape \(4, 3, 10\)", {0: torch.zeros(4, 3, 10)}),
        (ValueError, r"bias has shape \(9,\)", {2: torch.zeros(9)}),
        (ValueError, r"extra has shape \(10,\)", {3: torch.zeros(10)}),
        (ValueError, "seednorm needs weight", {1: None}),
        (ValueError, "seednorm needs extra", {3: None}),
        (ValueError, "layer has no extra", {3: torch.zeros(10), 4: "layer"}),
        (ValueError, "kind 'batch' is none of", {3: None, 4: "batch"}),
        (ValueError, "eps -1.0 is not positive", {5: -1.0}),
        (ValueError, "activation 'elu' is neither", {7: "elu"}),
        (ValueError, "dropout 1.0 is not in", {8: 1.0}),
        (ValueError, "width 9000 is above 8192", {0: torch.zeros(1, 9000), 1: None, 2: None, 3: None, 4: "rms"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(error: type[Exception], message: str, change: dict[int, object]) -> None:
    arguments = [*make_inputs((4, 10), "seednorm"), "seednorm", EPS, KAPPA, "relu", 0.0, 0]
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(error, match=message):
        hidden_norm_act(*arguments)


@pytest.mark.parametrize(
    ("width", "tile"),
    [
        (1, RowTile(2048, 1, 4)),
        (400, RowTile(4, 512, 4)),
        (1000, RowTile(2, 1024, 4)),
        (4096, RowTile(1, 4096, 8)),
        (8192, RowTile(1, 8192, 16)),
    ],
)
def test_wide_rows_take_more_warps(width: int, tile: RowTile) -> None:
    assert row_tile_of(width) == tile
