"""Normalizations against their definitions, written out row by row in fp64.

Legend: B rows, F fields, d embedding width, h hidden width. Inputs are [B, F, d] with an affine (F, d), or [B, h].
"""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn import functional

from masknet.norms import make_norm

NORMS = ("layer", "rms", "none")  # those that the reference here knows
EPS = 1e-5
SHAPES = [(3, 5), (1, 37), (7, 1), (39, 10), (7,), (37,), (1128,)]


def reference_row(name: str, row: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> list[float]:
    """One normalized axis; math.fsum rounds once, so what error there is belongs to the implementation."""
    values = [float(value) for value in row]
    if name == "none":
        return values
    mean = math.fsum(values) / len(values) if name == "layer" else 0.0
    second_moment = math.fsum((value - mean) ** 2 for value in values) / len(values)
    root = math.sqrt(second_moment + eps)
    shift = bias if name == "layer" else np.zeros(len(values))
    return [float(weight[i]) * (value - mean) / root + float(shift[i]) for i, value in enumerate(values)]


def reference(name: str, x: torch.Tensor, norm: nn.Module, eps: float = EPS) -> torch.Tensor:
    """The definition over the last axis of x [B, *shape]; for (F, d) each field has its own row of the affine."""
    wide, out = x.double().numpy(), np.zeros(x.shape)
    parameters = {key: value.double().numpy() for key, value in norm.state_dict().items()}
    weight, bias = parameters.get("weight", np.ones(x.shape[1:])), parameters.get("bias", np.zeros(x.shape[1:]))
    for b in range(x.shape[0]):
        if x.ndim == 2:
            out[b] = reference_row(name, wide[b], weight, bias, eps)
        else:
            for f in range(x.shape[1]):
                out[b, f] = reference_row(name, wide[b, f], weight[f], bias[f], eps)
    return torch.from_numpy(out)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_norm(
    name: str, shape: tuple[int, ...], *, eps: float = EPS, dtype: torch.dtype = torch.float64
) -> nn.Module:
    norm = make_norm(name, shape, eps=eps).to(dtype)
    with torch.no_grad():
        for i, parameter in enumerate(norm.parameters()):
            parameter.copy_(normal(*shape, seed=100 + i))
    return norm


@pytest.fixture(params=NORMS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_fp64(name: str, shape: tuple[int, ...]) -> None:
    norm, x = random_norm(name, shape), 2 * normal(4, *shape, seed=1) + 0.5
    out = norm(x)
    assert out.shape == x.shape
    assert out.dtype == torch.float64
    # a few roundings of 2e-16 in numbers below 100, times the 316 of 1/sqrt(eps) where d = 1 leaves nothing but eps
    torch.testing.assert_close(out, reference(name, x, norm), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("shape", [(3, 5), (39, 10), (37,), (1128,)], ids=str)
def test_forward_fp32(name: str, shape: tuple[int, ...], offset: float) -> None:
    norm = random_norm(name, shape, dtype=torch.float32)
    x = (normal(4, *shape, seed=2) + offset).float()
    out, expected = norm(x).detach(), reference(name, x, norm)
    assert out.dtype == torch.float32
    # Layer: the mean is off by about an ulp of |x|, made larger by γ / deviation. (A variance as E[x²] - E[x]² is off
    # by ulps of x², 1000 times as much with the offset.) All: statistic, root, product and sum, an ulp each.
    cancelled = 0.0
    if name == "layer":
        scale = float(norm.state_dict()["weight"].abs().max())
        cancelled = scale * float(x.abs().max()) / float(x.double().std(dim=-1, correction=0).min())
    tolerance = torch.finfo(torch.float32).eps * (cancelled + 4 * float(expected.abs().max()))
    assert float((out - expected).abs().max()) < tolerance


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_affine_is_per_field(name: str) -> None:
    norm, x = make_norm(name, (3, 5), eps=EPS).double(), normal(4, 3, 5)
    plain = norm(x)
    with torch.no_grad():
        norm.weight[1, 2] = 3.0
    scaled = norm(x)
    touched = torch.zeros(3, 5, dtype=torch.bool)
    touched[1, 2] = True
    assert torch.equal(scaled[:, ~touched], plain[:, ~touched])
    # one rounding of the product, in fp64
    torch.testing.assert_close(scaled[:, 1, 2], 3 * plain[:, 1, 2], rtol=1e-15, atol=0)


def test_bias_is_per_field() -> None:
    norm, x = make_norm("layer", (3, 5), eps=EPS).double(), normal(4, 3, 5)
    plain = norm(x)
    with torch.no_grad():
        norm.bias[2] = 7.0
    shifted = norm(x)
    assert torch.equal(shifted[:, :2], plain[:, :2])
    # one rounding of a sum near 7, in fp64
    torch.testing.assert_close(shifted[:, 2], plain[:, 2] + 7, rtol=1e-15, atol=0)


def test_fields_and_rows_do_not_see_each_other(name: str) -> None:
    norm, x = random_norm(name, (3, 5)), normal(4, 3, 5)
    changed = x.clone()
    changed[2, 1] *= -50
    differs = (norm(changed) != norm(x)).any(dim=-1)
    assert differs.nonzero().tolist() == [[2, 1]]


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_eps_dominates_tiny_rows(name: str) -> None:
    x = 1e-4 * normal(500, 2, 10)
    out = make_norm(name, (2, 10), eps=1e-5).double()(x).detach()
    # s / sqrt(s² + eps) = .0316; the mean of 1000 rows' spread is known to 2 %, and d = 10 takes 5 % off for the mean
    assert float(out.std()) == pytest.approx(0.0316, rel=0.1)
    without = make_norm(name, (2, 10), eps=1e-20).double()(x).detach()
    # the same rows with an eps of no weight: the mean square of a normalized row is 1 by definition
    assert float(without.square().mean()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-2, 1.0])
def test_eps_is_the_one_given(name: str, eps: float) -> None:
    norm, x = random_norm(name, (3, 5), eps=eps), 0.1 * normal(4, 3, 5, seed=3)
    # fp64 roundings in numbers below 10
    torch.testing.assert_close(norm(x), reference(name, x, norm, eps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 100.0])
@pytest.mark.parametrize("shape", [(3, 5), (3, 1), (7,)], ids=str)
def test_constant_rows(name: str, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> None:
    norm = random_norm(name, shape, dtype=dtype)
    x = torch.full((2, *shape), value, dtype=dtype)
    out = norm(x)
    assert out.dtype == dtype
    # sums and means of these values are exact, so that only root, product, sum and the cast are left to round
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), reference(name, x, norm), rtol=tolerance, atol=tolerance)


def test_zero_rows_give_the_bias() -> None:
    layer, rms = random_norm("layer", (3, 5)), random_norm("rms", (3, 5))
    zeros = torch.zeros(2, 3, 5, dtype=torch.float64)
    assert torch.equal(layer(zeros), layer.bias.expand(2, 3, 5))
    assert torch.equal(rms(zeros), zeros)


def test_width_one_leaves_only_the_bias_of_layer() -> None:
    norm = random_norm("layer", (7, 1))
    assert torch.equal(norm(normal(4, 7, 1)), norm.bias.expand(4, 7, 1))


@pytest.mark.parametrize("shape", [(3, 5), (7,)], ids=str)
def test_batch_of_one_is_a_row_of_any_batch(name: str, shape: tuple[int, ...]) -> None:
    norm, x = random_norm(name, shape), normal(6, *shape)
    # vectorized loops may sum a lone row in another order: a rounding of fp64
    torch.testing.assert_close(norm(x[4:5]), norm(x)[4:5], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (7,)], ids=str)
def test_empty_batch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = random_norm(name, shape, dtype=torch.float32)
    x = torch.empty(0, *shape, dtype=dtype, requires_grad=True)
    out = norm(x)
    assert out.shape == (0, *shape)
    assert out.dtype == dtype
    out.sum().backward()
    assert x.grad is not None
    assert all(torch.equal(parameter.grad, torch.zeros(shape)) for parameter in norm.parameters())


@pytest.mark.parametrize("shape", [(3, 5), (37,)], ids=str)
def test_non_contiguous_input_and_gradient(name: str, shape: tuple[int, ...]) -> None:
    norm = random_norm(name, shape)
    wide, gradient = normal(*shape, 4, seed=4).movedim(-1, 0), normal(*shape, 4, seed=5).movedim(-1, 0)
    assert not wide.is_contiguous()
    results = []
    for x, upstream in [(wide, gradient), (wide.contiguous(), gradient.contiguous())]:
        x = x.detach().requires_grad_()
        out = norm(x)
        results.append([out, *torch.autograd.grad(out, [x, *norm.parameters()], upstream)])
    for strided, dense in zip(*results, strict=True):
        # sums in another order: fp64 roundings in numbers below 100
        torch.testing.assert_close(strided, dense, rtol=1e-13, atol=1e-13)


def eager(name: str, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """Torch's own operators in x's precision, one call a field where there are fields."""
    parameters = {key: value.to(x.dtype) for key, value in norm.state_dict().items()}
    weight, bias, width = parameters["weight"], parameters.get("bias"), x.shape[-1:]
    if x.ndim == 3:
        fields = [
            functional.layer_norm(x[:, f], width, weight[f], bias[f], EPS)
            if bias is not None
            else functional.rms_norm(x[:, f], width, weight[f], EPS)
            for f in range(x.shape[1])
        ]
        return torch.stack(fields, dim=1)
    if bias is not None:
        return functional.layer_norm(x, width, weight, bias, EPS)
    return functional.rms_norm(x, width, weight, EPS)


@pytest.mark.parametrize("parameters", ["of fp32", "of the input's dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (39, 10), (7,), (400,)], ids=str)
@pytest.mark.parametrize("name", ["layer", "rms"])
def test_low_precision(name: str, shape: tuple[int, ...], dtype: torch.dtype, parameters: str) -> None:
    norm = random_norm(name, shape, dtype=dtype)  # rounded to dtype, so that all three read the same numbers
    if parameters == "of fp32":
        norm = norm.float()
    x = (normal(16, *shape, seed=6) + 0.5).to(dtype)
    out, expected = norm(x).detach(), reference(name, x, norm)
    assert out.dtype == dtype
    error, eager_error = (out.double() - expected).abs(), (eager(name, x, norm).detach().double() - expected).abs()
    # the project's rule for a low precision: at most twice the error of eager torch in it
    assert float(error.max()) <= 2 * float(eager_error.max())
    assert float(error.square().mean().sqrt()) <= 2 * float(eager_error.square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_of_none_is_the_input(dtype: torch.dtype) -> None:
    x = normal(4, 3, 5).to(dtype)
    assert torch.equal(make_norm("none", (3, 5), eps=EPS)(x), x)


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_squares_beyond_fp16_do_not_overflow(name: str) -> None:
    norm, x = random_norm(name, (37,), dtype=torch.float16), (1e4 * normal(4, 37, seed=7)).half()
    assert bool(torch.isinf(x * x).any())
    out, expected = norm(x).detach(), reference(name, x, norm)
    # one rounding of the result to fp16, of numbers below 16
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(torch.float16).eps, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 5), (2, 1), (7,)], ids=str)
def test_gradients(name: str, shape: tuple[int, ...]) -> None:
    norm, x = random_norm(name, shape), normal(3, *shape, seed=8).requires_grad_()
    names = [key for key, _ in norm.named_parameters()]

    def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return functional_call(norm, dict(zip(names, parameters, strict=True)), (x,))

    assert gradcheck(call, (x, *norm.parameters()))


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_zero_rows_have_finite_gradients(name: str) -> None:
    norm, x = random_norm(name, (3, 5)), torch.zeros(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(norm, (x,), eps=1e-7)  # a step far below sqrt(eps) = .003, within which the norm bends


@pytest.mark.parametrize("shape", [(3, 5), (7,)], ids=str)
def test_state_dict_keys_are_torchs(name: str, shape: tuple[int, ...]) -> None:
    state = make_norm(name, shape, eps=EPS).state_dict()
    assert list(state) == {"layer": ["weight", "bias"], "rms": ["weight"], "none": []}[name]
    assert all(value.shape == shape for value in state.values())


def test_starts_as_the_bare_normalization() -> None:
    layer, rms = make_norm("layer", (3, 5), eps=EPS), make_norm("rms", (3, 5), eps=EPS)
    assert torch.equal(layer.weight, torch.ones(3, 5))
    assert torch.equal(layer.bias, torch.zeros(3, 5))
    assert torch.equal(rms.weight, torch.ones(3, 5))


@pytest.mark.parametrize(("name", "own"), [("layer", nn.LayerNorm), ("rms", nn.RMSNorm)])
@pytest.mark.parametrize("shape", [(10,), (1, 10)], ids=str)
def test_one_field_is_torchs_own_layer(
    name: str, own: type[nn.LayerNorm] | type[nn.RMSNorm], shape: tuple[int, ...]
) -> None:
    norm = random_norm(name, shape)
    torchs = own(10, eps=EPS, dtype=torch.float64)
    torchs.load_state_dict({key: value.reshape(10) for key, value in norm.state_dict().items()})
    x = normal(4, *shape)
    # the affine may be fused into the same loop: fp64 roundings in numbers below 10
    torch.testing.assert_close(norm(x), torchs(x), rtol=1e-13, atol=1e-13)


def test_does_not_look_at_the_instance(name: str) -> None:
    norm, x = random_norm(name, (3, 5)), normal(4, 3, 5)
    assert torch.equal(norm(x, instance=normal(4, 15, seed=9)), norm(x))


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_repr_shows_shape_and_eps(name: str) -> None:
    norm = make_norm(name, (3, 5), eps=1e-5)
    assert norm.extra_repr() == "(3, 5), eps=1e-05"
    assert "(3, 5), eps=1e-05" in repr(norm)


def test_unknown_name() -> None:
    with pytest.raises(KeyError, match="batchnorm"):
        make_norm("batchnorm", (3, 5), eps=EPS)
