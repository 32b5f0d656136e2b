"""The fused PowerNorm and activation against its formula in fp64: outputs, sums over rows, and every gradient.

Legend: B rows, h channels.
"""

import pytest
import torch

from masknet.kernels.power_norm_act import power_norm_act, power_norm_act_backward
from tests.masknet.kernels.reference import DEVICE, DTYPES, ROWS, assert_as_exact_as_eager, assert_finite_alike, double

activations = pytest.mark.parametrize("activation", ["none", "relu"])
# of x, of weight and bias
PRECISIONS = [*((dtype, torch.float32) for dtype in DTYPES), (torch.bfloat16, torch.float16)]
SHAPES = [(500, 1), (63, 200), (1, 512), (2, 1000), (20, 400)]


def make_inputs(
    shape: tuple[int, int], rows: str = "normal", precision: tuple[torch.dtype, ...] = PRECISIONS[0]
) -> list[torch.Tensor]:
    """x, inverse, weight, bias, dout, estimate."""
    B, h = shape
    torch.manual_seed(0)
    x, inverse = ROWS[rows](B, h).to(precision[0]), torch.rand(h) + 0.5
    weight, bias = torch.randn(2, h).to(precision[1])
    dout, estimate = torch.randn(B, h).to(precision[0]), torch.randn(h)
    # where rounding alone holds the output on one side of 0 either gradient is right
    dout *= (x.double() * inverse * weight + bias).abs() > 1e-5 * x.double().abs().max().clamp(min=1)
    return [each.to(DEVICE) for each in (x, inverse, weight, bias, dout, estimate)]


def fused(activation: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """out, dx, dweight, dbias, the sum of x², the sum of g ⊙ z."""
    x, inverse, weight, bias, dout, estimate = inputs
    out, square = power_norm_act(x, inverse, weight, bias, activation)
    *grads, product = power_norm_act_backward(dout, x, inverse, weight, bias, estimate, activation)
    return [out, *grads, square, product]


def formula(activation: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The same in fp64, or in fp32 and then in the dtype of x, as `masknet.norms.power` does."""
    x, inverse, weight, bias, dout, estimate = inputs
    wide = x if x.dtype == torch.float64 else x.float()
    z = wide * inverse
    y = (z * weight + bias).to(x.dtype)
    dy = dout.to(wide.dtype) if activation == "none" else dout.to(wide.dtype).masked_fill(y <= 0, 0)
    g = dy * weight
    dweight, dbias = (dy * z).sum(0).to(weight.dtype), dy.sum(0).to(bias.dtype)
    dx = ((g - estimate * z) * inverse).to(x.dtype)
    out = torch.relu(y) if activation == "relu" else y
    return [out, dx, dweight, dbias, wide.square().sum(0), (g * z).sum(0)]


def compare(activation: str, *inputs: torch.Tensor) -> None:
    exact = formula(activation, *double(inputs))
    assert_as_exact_as_eager(fused(activation, *inputs), formula(activation, *inputs), exact)


@activations
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: "-".join(str(dtype)[6:] for dtype in p))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_sums_and_gradients(
    shape: tuple[int, int], precision: tuple[torch.dtype, ...], activation: str
) -> None:
    compare(activation, *make_inputs(shape, precision=precision))


@activations
@pytest.mark.parametrize("rows", [name for name in ROWS if name != "normal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unusual_rows(dtype: torch.dtype, rows: str, activation: str) -> None:
    compare(activation, *make_inputs((20, 50), rows, (dtype, torch.float32)))


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # numpy on ∞ · 0, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_inf_go_where_eager_sends_them(value: float) -> None:
    inputs = make_inputs((5, 20))
    inputs[0][2, 4] = value
    assert_finite_alike(fused("none", *inputs), formula("none", *inputs))
    assert_finite_alike(fused("relu", *inputs), formula("relu", *inputs))


def test_any_strides() -> None:
    x, inverse, weight, bias, dout, estimate = make_inputs((6, 30))
    wide = torch.cat([dout, x], 1)
    expected = fused("relu", x, inverse, weight, bias, dout, estimate)
    for x_ in (wide[:, 30:], x.t().contiguous().t()):
        for dout_ in (wide[:, :30], dout.t().contiguous().t()):
            got = fused("relu", x_, torch.stack([inverse, inverse], 1)[:, 0], weight, bias, dout_, estimate)
            assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    compare("relu", x[:1].expand(6, 30), inverse, weight, bias, dout[0, 0].expand(6, 30), estimate)


@activations
def test_an_empty_batch_sums_to_zero(activation: str) -> None:
    x, inverse, weight, bias, dout, estimate = make_inputs((4, 20))
    out, dx, *sums = fused(activation, x[:0], inverse, weight, bias, dout[:0], estimate)
    assert out.shape == dx.shape == (0, 20)
    assert all(torch.equal(each, torch.zeros(20, device=DEVICE)) for each in sums)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "x is torch.float64", {0: torch.zeros(4, 10, dtype=torch.float64)}),
        (ValueError, r"x has shape \(10,\)", {0: torch.zeros(10)}),
        (ValueError, r"bias has shape \(9,\)", {3: torch.zeros(9)}),
        (ValueError, "activation 'elu' is neither", {4: "elu"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(error: type[Exception], message: str, change: dict[int, object]) -> None:
    arguments = [*make_inputs((4, 10))[:4], "relu"]
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(error, match=message):
        power_norm_act(*arguments)


@pytest.mark.parametrize(("index", "name"), [(0, "dout"), (5, "estimate")])
def test_backward_refuses_other_shapes(index: int, name: str) -> None:
    x, inverse, weight, bias, dout, estimate = make_inputs((4, 10))
    arguments = [dout, x, inverse, weight, bias, estimate, "none"]
    arguments[index] = torch.zeros(3, device=DEVICE)
    with pytest.raises(ValueError, match=f"{name} has shape"):
        power_norm_act_backward(*arguments)
