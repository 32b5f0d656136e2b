"""Normalizations of a row beyond layer and RMS norm, against their formulas in fp64, one row at a time.

Legend: B rows, F fields, d embedding width, h hidden width, D width of the raw embedding. Inputs are [B, F, d] with
parameters of (F, d), or [B, h].
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

from masknet.blocks import MaskBlock, NoMask
from masknet.norms import NORMS, make_norm
from masknet.norms.base import Norm

EPS, D = 1e-5, 5
SHAPES = [(3, 6), (1, 4), (5, 2), (8,), (1128,)]  # of even widths: some cases cut a row in two
SLOTS = [(3, 6), (8,)]
slots = pytest.mark.parametrize("shape", SLOTS, ids=str)


class Case(NamedTuple):
    """A norm's name, its constructor's parameters, and in how many parts it cuts a row."""

    name: str
    parameters: dict[str, Any]
    parts: int = 1


CASES = {
    "dyt": Case("dyt", {}),
    "bhyt": Case("bhyt", {"kappa": 3.0}),
    "seednorm": Case("seednorm", {}),
    "seednorm of 2 heads": Case("seednorm", {"heads": 2}, 2),
    "l1": Case("l1", {}),
    "evonorm_s0": Case("evonorm_s0", {"groups": 1}),
    "evonorm_s0 of 2 groups": Case("evonorm_s0", {"groups": 2}, 2),
    "variance_only": Case("variance_only", {}),
    "conditional": Case("conditional", {"rank": 2}),
    "affine": Case("affine", {}),
    "affine centred": Case("affine", {"centred": True}),
}
WITHOUT_STATISTICS = ("dyt", "affine")
CENTRING = ("l1", "evonorm_s0", "evonorm_s0 of 2 groups", "variance_only", "conditional", "affine centred")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def cases(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


# The definitions, of rows x [..., width], in plain operations of x's own precision.


def formula(case: Case, x: torch.Tensor, p: dict[str, torch.Tensor], eps: float) -> torch.Tensor:
    """Parameters p of the same rows; those of conditional have had the instance's deltas added."""
    weight = p.get("weight", torch.zeros(()))
    if case.name == "dyt":
        return torch.tanh(p["alpha"] * x) * weight + p["bias"]
    if case.name == "affine":
        return weight * (x - x.mean(-1, keepdim=True) if case.parameters else x) + p["bias"]
    rms = ((x * x).mean(-1, keepdim=True) + eps).sqrt()
    if case.name == "bhyt":
        return torch.tanh(x / rms * (p["bound"] / case.parameters["kappa"])) * weight
    if case.name == "seednorm":
        parts = [part.chunk(case.parts, -1) for part in (x, p["beta"], p["alpha"])]
        gates = [torch.tanh((a * b).sum(-1, keepdim=True)) * c for a, b, c in zip(*parts, strict=True)]
        return (torch.cat(gates, -1) + weight) * (x / rms)
    centred = x - x.mean(-1, keepdim=True)
    if case.name == "l1":
        return weight * (centred / (centred.abs().mean(-1, keepdim=True) + eps)) + p["bias"]
    if case.name == "evonorm_s0":
        swish, out = x * torch.sigmoid(p["slope"] * x), []
        for part, swished in zip(x.chunk(case.parts, -1), swish.chunk(case.parts, -1), strict=True):
            spread = part - part.mean(-1, keepdim=True)
            out.append(swished / ((spread * spread).mean(-1, keepdim=True) + eps).sqrt())
        return torch.cat(out, -1) * weight + p["bias"]
    deviation = ((centred * centred).mean(-1, keepdim=True) + eps).sqrt()
    return (x if case.name == "variance_only" else centred) / deviation * weight + p["bias"]


def parameters_of(norm: nn.Module, dtype: torch.dtype, instance: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state in dtype; weight and bias of conditional [B, *shape], with the instance's part."""
    state = {key: value.to(dtype) for key, value in norm.state_dict().items()}
    if "project.weight" not in state:
        return state
    inner = torch.relu(instance.to(dtype) @ state["aggregate.weight"].T + state["aggregate.bias"])
    deltas = inner @ state["project.weight"].T + state["project.bias"]
    half = state["weight"].numel()
    shape = (-1, *state["weight"].shape)
    return {
        "weight": state["weight"] + deltas[:, :half].reshape(shape),
        "bias": state["bias"] + deltas[:, half:].reshape(shape),
    }


def reference(case: Case, x: torch.Tensor, norm: nn.Module, instance: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """The formula of every row on its own, in fp64."""
    wide, out = x.double(), torch.zeros(x.shape, dtype=torch.float64)
    for b in range(len(x)):
        p = parameters_of(norm, torch.float64, instance[b : b + 1])
        for place in [(f,) for f in range(x.shape[1])] if x.ndim == 3 else [()]:
            own = {key: (value[0] if value.ndim == x.ndim else value)[place] for key, value in p.items()}
            out[(b, *place)] = formula(case, wide[(b, *place)], own, eps)
    return out


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh(case: Case, shape: tuple[int, ...], eps: float = EPS, **parameters: Any) -> Norm:
    return make_norm(case.name, shape, eps=eps, instance_width=D, **{**case.parameters, **parameters})


def randomized(norm: Norm, dtype: torch.dtype = torch.float64) -> Norm:
    norm = norm.to(dtype)
    with torch.no_grad():
        for i, parameter in enumerate(norm.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=100 + i))
    return norm


def random_norm(case: Case, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, eps: float = EPS) -> Norm:
    return randomized(fresh(case, shape, eps), dtype)


def raw(rows: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return normal(rows, D, seed=9).to(dtype)


# Forward.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_fp64(case: Case, shape: tuple[int, ...]) -> None:
    norm, x = random_norm(case, shape), 2 * normal(4, *shape, seed=1) + 0.5
    out = norm(x, raw(4))
    assert out.shape == x.shape
    assert out.dtype == torch.float64
    # some roundings of 2e-16 in numbers below 1000: 316 = 1/sqrt(eps) times x where a group is one value
    torch.testing.assert_close(out, reference(case, x, norm, raw(4)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "offset"), [(name, offset) for name in CASES for offset in ((0.0, 1000.0) if name in CENTRING else (0.0,))]
)
@pytest.mark.parametrize("shape", [(3, 6), (39, 10), (8,), (400,)], ids=str)
def test_forward_fp32(name: str, shape: tuple[int, ...], offset: float) -> None:
    case = CASES[name]
    norm, x = random_norm(case, shape, torch.float32), (normal(4, *shape, seed=2) + offset).float()
    out, expected = norm(x, raw(4, torch.float32)).detach(), reference(case, x, norm, raw(4, torch.float32))
    assert out.dtype == torch.float32
    # The mean is off by about an ulp of |x|, which γ and the division make larger (not where x itself is the dividend);
    # a variance as E[x²] − E[x]² would be off by 1000 times as much. Else some ulps of the largest result.
    cancelled = 0.0
    if name in ("l1", "conditional", "affine centred"):
        divisor = 1.0 if case.name == "affine" else float((x - x.mean(-1, keepdim=True)).abs().mean(-1).min())
        scale = parameters_of(norm, torch.float64, raw(4))["weight"].abs().max()
        cancelled = float(scale * x.abs().max()) / divisor
    tolerance = torch.finfo(torch.float32).eps * (cancelled + 8 * float(expected.abs().max()))
    assert float((out - expected).abs().max()) < tolerance


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-2, 1.0])
@slots
def test_eps_is_the_one_given(case: Case, shape: tuple[int, ...], eps: float) -> None:
    norm, x = random_norm(case, shape, eps=eps), 0.1 * normal(4, *shape, seed=3)
    # fp64 roundings in numbers below 100
    torch.testing.assert_close(norm(x, raw(4)), reference(case, x, norm, raw(4), eps), rtol=1e-12, atol=1e-12)


def test_default_eps() -> None:
    others = dict.fromkeys(NORMS, 1e-5)
    assert {name: norm.default_eps for name, norm in NORMS.items()} == {**others, "l1": 3e-3, "bhyt": 1e-6}


def test_conditional_reads_the_rows_own_instance() -> None:
    norm, x, instance = random_norm(CASES["conditional"], (3, 6)), normal(4, 3, 6), raw(4)
    changed = instance.clone()
    changed[2] += 1
    differs = (norm(x, changed) != norm(x, instance)).flatten(1).any(1)
    assert differs.tolist() == [False, False, True, False]


def test_only_conditional_reads_the_instance(case: Case) -> None:
    norm, x = random_norm(case, (8,)), normal(4, 8)
    assert torch.equal(norm(x, raw(4)), norm(x, raw(4) + 1)) == (case.name != "conditional")


def test_rows_and_fields_do_not_see_each_other(case: Case) -> None:
    norm, x = random_norm(case, (3, 6)), normal(4, 3, 6)
    changed = x.clone()
    changed[2, 1] *= -50
    differs = (norm(changed, raw(4)) != norm(x, raw(4))).any(dim=-1)
    assert differs.nonzero().tolist() == [[2, 1]]


def test_parameters_are_per_field(case: Case) -> None:
    norm, x = random_norm(case, (3, 6)), normal(4, 3, 6)
    plain, own = norm(x, raw(4)), [key for key, _ in norm.named_parameters() if "." not in key]
    assert own
    for key in own:
        changed = copy.deepcopy(norm)
        with torch.no_grad():
            changed.get_parameter(key)[1] += 0.5
        differs = (changed(x, raw(4)) != plain).flatten(2).any(2).any(0)
        assert differs.tolist() == [False, True, False], key


@slots
def test_batch_of_one_is_a_row_of_any_batch(case: Case, shape: tuple[int, ...]) -> None:
    norm, x = random_norm(case, shape), normal(6, *shape)
    # vectorized loops may sum a lone row in another order: roundings of fp64 in numbers below 100
    torch.testing.assert_close(norm(x[4:5], raw(6)[4:5]), norm(x, raw(6))[4:5], rtol=1e-13, atol=1e-13)


# Gradients.


@pytest.mark.parametrize("shape", [(2, 4), (6,)], ids=str)
def test_gradients(case: Case, shape: tuple[int, ...]) -> None:
    norm, x = random_norm(case, shape), normal(3, *shape, seed=8).requires_grad_()
    names = [key for key, _ in norm.named_parameters()]

    def call(x: torch.Tensor, instance: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return functional_call(norm, dict(zip(names, parameters, strict=True)), (x, instance))

    assert gradcheck(call, (x, raw(3).requires_grad_(case.name == "conditional"), *norm.parameters()))


Row = dict[str, np.ndarray]


def dyt_backward(case: Case, x: np.ndarray, dy: np.ndarray, p: Row) -> Row:
    bounded = np.tanh(p["alpha"] * x)
    q = dy * p["weight"] * (1 - bounded**2)
    return {"x": p["alpha"] * q, "alpha": np.sum(q * x, keepdims=True), "weight": dy * bounded, "bias": dy}


def bhyt_backward(case: Case, x: np.ndarray, dy: np.ndarray, p: Row) -> Row:
    r = 1 / np.sqrt(np.mean(x**2) + EPS)
    normed, share = x * r, p["bound"] / case.parameters["kappa"]
    bounded = np.tanh(share * normed)
    inner = dy * p["weight"] * (1 - bounded**2)
    q = inner * share
    dx = r * (q - normed * np.mean(q * normed))
    bound = np.sum(inner * normed / case.parameters["kappa"], keepdims=True)
    return {"x": dx, "bound": bound, "weight": dy * bounded}


def seednorm_backward(case: Case, x: np.ndarray, dy: np.ndarray, p: Row) -> Row:
    r = 1 / np.sqrt(np.mean(x**2) + EPS)
    normed, width = x * r, len(x) // case.parts
    gate, delta = np.zeros(len(x)), np.zeros(len(x))
    for start in range(0, len(x), width):
        head = slice(start, start + width)
        gate[head] = np.tanh(np.sum(x[head] * p["beta"][head]))
        delta[head] = (1 - gate[head] ** 2) * np.sum(dy[head] * p["alpha"][head] * normed[head])
    q = dy * (gate * p["alpha"] + p["weight"])
    dx = r * (q - normed * np.mean(q * normed)) + delta * p["beta"]
    return {"x": dx, "alpha": gate * dy * normed, "weight": dy * normed, "beta": delta * x}


def l1_backward(case: Case, x: np.ndarray, dy: np.ndarray, p: Row) -> Row:
    centred = x - np.mean(x)
    divisor, sign = np.mean(np.abs(centred)) + EPS, np.sign(centred)
    normed, g = centred / divisor, dy * p["weight"]
    dx = (g - np.mean(g) - np.mean(g * normed) * (sign - np.mean(sign))) / divisor
    return {"x": dx, "weight": dy * normed, "bias": dy}


BACKWARD: dict[str, Callable[[Case, np.ndarray, np.ndarray, Row], Row]] = {
    "dyt": dyt_backward,
    "bhyt": bhyt_backward,
    "seednorm": seednorm_backward,
    "seednorm of 2 heads": seednorm_backward,
    "l1": l1_backward,
}


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_in_closed_form(name: str, shape: tuple[int, ...]) -> None:
    case, fields = CASES[name], shape[0] if len(shape) == 2 else 1
    norm, x, dy = random_norm(case, shape), normal(4, *shape, seed=8).requires_grad_(), normal(4, *shape, seed=5)
    norm(x).backward(dy)
    state = {key: value.detach().reshape(fields, -1).numpy() for key, value in norm.named_parameters()}
    expected = {key: np.zeros(value.shape) for key, value in state.items()}
    dx = np.zeros((4, fields, shape[-1]))
    rows, upstream = (each.detach().reshape(dx.shape).numpy() for each in (x, dy))
    for b in range(4):
        for f in range(fields):
            own = {key: value[f] for key, value in state.items()}
            row = BACKWARD[name](case, rows[b, f], upstream[b, f], own)
            dx[b, f] = row.pop("x")
            assert row.keys() == own.keys()
            for key, gradient in row.items():
                expected[key][f] += gradient
    actual = {"x": x.grad, **{key: parameter.grad for key, parameter in norm.named_parameters()}}
    for key, value in {"x": dx, **expected}.items():
        # fp64, sums of up to 4,512 products of numbers below 100
        torch.testing.assert_close(actual[key], torch.from_numpy(value).view_as(actual[key]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@slots
def test_empty_batch(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm, x = random_norm(case, shape, torch.float32), torch.empty(0, *shape, dtype=dtype, requires_grad=True)
    out = norm(x, raw(0, dtype))
    assert out.shape == (0, *shape)
    assert out.dtype == dtype
    out.sum().backward()
    assert x.grad is not None
    assert all(torch.equal(parameter.grad, torch.zeros(parameter.shape)) for parameter in norm.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 100.0])
@slots
def test_constant_rows(case: Case, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> None:
    norm, x = random_norm(case, shape, dtype), torch.full((2, *shape), value, dtype=dtype, requires_grad=True)
    instance = raw(2, dtype)
    out = norm(x, instance)
    expected = reference(case, x.detach(), norm, instance)
    # Sums and means of these values are exact, and so is what centring leaves: roundings of products and of the result
    # remain, relative to the largest terms that were added up (x · β, and the deltas of conditional).
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance * (1 + abs(value)))
    out.sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in norm.parameters())]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


@slots
def test_non_contiguous_input_and_gradient(case: Case, shape: tuple[int, ...]) -> None:
    norm = random_norm(case, shape)
    wide, gradient = normal(*shape, 4, seed=4).movedim(-1, 0), normal(*shape, 4, seed=5).movedim(-1, 0)
    assert not wide.is_contiguous()
    results = []
    for x, upstream in [(wide, gradient), (wide.contiguous(), gradient.contiguous())]:
        x = x.detach().requires_grad_()
        out = norm(x, raw(4))
        results.append([out, *torch.autograd.grad(out, [x, *norm.parameters()], upstream)])
    for strided, dense in zip(*results, strict=True):
        # sums in another order: fp64 roundings in numbers below 100
        torch.testing.assert_close(strided, dense, rtol=1e-13, atol=1e-13)


# Low precision.


@pytest.mark.parametrize("parameters", ["of fp32", "of the input's dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 6), (39, 10), (8,), (400,)], ids=str)
def test_low_precision(case: Case, shape: tuple[int, ...], dtype: torch.dtype, parameters: str) -> None:
    norm = random_norm(case, shape, dtype)  # rounded to dtype, so that all three read the same numbers
    if parameters == "of fp32":
        norm = norm.float()
    x, instance = (normal(16, *shape, seed=6) + 0.5).to(dtype), raw(16, dtype)
    out, expected = norm(x, instance).detach(), reference(case, x, norm, instance)
    assert out.dtype == dtype
    eager = formula(case, x, parameters_of(norm, dtype, instance), EPS)
    assert eager.dtype == dtype
    error, eager_error = (out.double() - expected).abs(), (eager.double() - expected).abs()
    # the project's rule for a low precision: at most twice the error of eager torch in it
    assert float(error.max()) <= 2 * float(eager_error.max())
    assert float(error.square().mean().sqrt()) <= 2 * float(eager_error.square().mean().sqrt())


@cases(*(name for name in CASES if name not in WITHOUT_STATISTICS))
def test_statistics_beyond_fp16_do_not_overflow(case: Case) -> None:
    norm, instance = random_norm(case, (40,), torch.float16), raw(4, torch.float16)
    x = (6e4 * (1 - 2 * (normal(4, 40, seed=7) > 0.7).double()) + 1e3 * normal(4, 40, seed=8)).half()
    assert bool(x.isfinite().all())
    assert bool(torch.isinf(x * x).any())
    assert bool(torch.isinf(x - x.mean(-1, keepdim=True)).any())
    if case.name == "affine":
        with torch.no_grad():
            norm.weight.mul_(1e-3)  # lest the result itself be out of range
    out, expected = norm(x, instance).detach().double(), reference(case, x, norm, instance)
    # one rounding of the result to fp16; the deltas of conditional, computed in fp16, add some of numbers below 16
    tolerance = torch.finfo(torch.float16).eps
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=0.02 if case.name == "conditional" else 1e-4)
    in_fp16 = formula(case, x, parameters_of(norm, torch.float16, instance), EPS).double()
    assert not torch.allclose(in_fp16, expected, rtol=0.1, atol=0.1)


# The start, and what is stored.


def values(norm: Norm) -> dict[str, set[float]]:
    return {key: set(value.flatten().tolist()) for key, value in norm.double().named_parameters()}


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("bhyt", {}, {"bound": {2.0}, "weight": {5.0}}),
        ("bhyt", {"kappa": 6.0, "bound": 1.5}, {"bound": {1.5}, "weight": {4.0}}),
        ("bhyt", {"kappa": 6.0, "gain": 1.0}, {"bound": {2.0}, "weight": {1.0}}),
        ("seednorm", {}, {"weight": {1.0}, "alpha": {1.0}, "beta": {0.0}}),
        ("l1", {"gain": 1.0}, {"weight": {1.0}, "bias": {0.0}}),
        ("evonorm_s0", {}, {"weight": {1.0}, "bias": {0.0}, "slope": {1.0}}),
        ("variance_only", {}, {"weight": {1.0}, "bias": {0.0}}),
        ("affine", {}, {"weight": {1.0}, "bias": {0.0}}),
    ],
)
@slots
def test_initial_parameters(
    name: str, parameters: dict[str, Any], expected: dict[str, set[float]], shape: tuple[int, ...]
) -> None:
    assert values(make_norm(name, shape, eps=EPS, **parameters)) == expected


@pytest.mark.parametrize(
    ("shape", "parameters", "alpha"), [((8,), {}, 0.5), ((3, 6), {}, 10.0), ((8,), {"alpha": 2.0}, 2.0)]
)
def test_dyt_starts_by_its_slot(shape: tuple[int, ...], parameters: dict[str, Any], alpha: float) -> None:
    norm = make_norm("dyt", shape, eps=EPS, **parameters)
    assert values(norm) == {"alpha": {alpha}, "weight": {1.0}, "bias": {0.0}}
    assert norm.alpha.shape == (*shape[:-1], 1)


def test_l1_starts_at_the_scale_of_layer_norm() -> None:
    norm, x = make_norm("l1", (1128,), eps=1e-9).double(), 3 * normal(64, 1128) + 7
    assert float(norm.weight.detach()[0]) == pytest.approx(np.sqrt(2 / np.pi), rel=1e-7)  # of an fp32
    # mean absolute deviations of 1128 normal values are known to 2.2 %, the mean of 64 of them to .3 %
    assert float(norm(x).detach().std()) == pytest.approx(1.0, abs=0.01)


@slots
def test_bhyt_starts_at_the_scale_of_rms_norm(shape: tuple[int, ...]) -> None:
    norm, x = make_norm("bhyt", shape, eps=EPS).double(), normal(500, *shape)
    # tanh(u) is u (1 − u²/3 + …), and the mean of u² is .04 at the start: a few percent less
    assert float(norm(x).detach().square().mean().sqrt()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", ["seednorm", "conditional"])
@slots
def test_starts_as_rms_or_layer_norm(name: str, shape: tuple[int, ...]) -> None:
    x = normal(4, *shape) + 0.5
    centred = x - x.mean(-1, keepdim=True) if name == "conditional" else x
    expected = centred / ((centred * centred).mean(-1, keepdim=True) + EPS).sqrt()
    # fp64 roundings in numbers below 10
    torch.testing.assert_close(fresh(CASES[name], shape).double()(x, raw(4)), expected, rtol=1e-13, atol=1e-13)


def test_conditional_learns_from_its_start() -> None:
    norm = fresh(CASES["conditional"], (8,)).double()
    norm(normal(4, 8), raw(4)).backward(normal(4, 8, seed=5))
    assert float(norm.project.weight.grad.abs().max()) > 0
    assert norm.project.weight.shape == (16, 2)


@pytest.mark.parametrize(("width", "groups"), [(400, 25), (1128, 24), (16, 1), (10, 1), (37, 1), (32, 2), (1024, 32)])
def test_evonorm_has_as_many_groups_as_leave_16_entries(width: int, groups: int) -> None:
    assert make_norm("evonorm_s0", (width,), eps=EPS).groups == groups


OWN_KEYS = {
    "dyt": ["alpha", "weight", "bias"],
    "bhyt": ["bound", "weight"],
    "seednorm": ["weight", "alpha", "beta"],
    "l1": ["weight", "bias"],
    "evonorm_s0": ["weight", "bias", "slope"],
    "variance_only": ["weight", "bias"],
    "conditional": ["weight", "bias", "aggregate.weight", "aggregate.bias", "project.weight", "project.bias"],
    "affine": ["weight", "bias"],
}


@slots
def test_state_round_trip(case: Case, shape: tuple[int, ...], tmp_path: Path) -> None:
    norm, x = random_norm(case, shape, torch.float32), normal(4, *shape).float()
    assert sorted(norm.state_dict()) == sorted(OWN_KEYS[case.name])
    save_file(norm.state_dict(), tmp_path / "norm.safetensors")
    other = fresh(case, shape)
    assert not torch.equal(other(x, raw(4, torch.float32)), norm(x, raw(4, torch.float32)))
    other.load_state_dict(load_file(tmp_path / "norm.safetensors"))
    assert torch.equal(other(x, raw(4, torch.float32)), norm(x, raw(4, torch.float32)))


def test_repr(case: Case) -> None:
    shown = fresh(case, (3, 6)).extra_repr()
    own = {
        "bhyt": ", kappa=3.0",
        "seednorm": f", heads={case.parts}",
        "evonorm_s0": f", groups={case.parts}",
        "conditional": ", rank=2",
    }
    if case.name == "affine":
        assert shown == f"(3, 6), centred={bool(case.parameters)}"
    else:
        assert shown == "(3, 6), eps=1e-05" + own.get(case.name, "")


# What the rest of the program is told of a norm.


@slots
def test_fold_is_the_norm_or_nothing(case: Case, shape: tuple[int, ...]) -> None:
    norm, x = random_norm(case, shape).eval(), normal(4, *shape)
    folded = norm.fold()
    assert (folded is not None) == (case.name == "affine" and not case.parameters)
    if folded is not None:
        assert not folded.scale.requires_grad
        assert not folded.shift.requires_grad
        # one operation that rounds once may be two here: fp64
        torch.testing.assert_close(folded.scale * x + folded.shift, norm(x).detach(), rtol=1e-14, atol=1e-14)


@slots
def test_none_folds_to_the_identity(shape: tuple[int, ...]) -> None:
    folded = make_norm("none", shape, eps=EPS).fold()
    assert folded is not None
    assert torch.equal(folded.scale, torch.ones(shape))
    assert torch.equal(folded.shift, torch.zeros(shape))


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_layer_and_rms_do_not_fold(name: str) -> None:
    assert make_norm(name, (8,), eps=EPS).eval().fold() is None


@pytest.mark.parametrize("name", NORMS)
def test_scale_invariance_is_as_the_flag_says(name: str) -> None:
    parameters = {"warmup_steps": 0} if name in ("power", "unified") else {}
    norm = randomized(make_norm(name, (6,), eps=1e-24, instance_width=D, **parameters))
    norm.set_progress(0.5)  # where prepbn blends both its norms
    with torch.no_grad():
        for step in range(6):  # beyond what unified takes as its start
            norm(normal(20, 6, seed=step), raw(20))
        outs = [copy.deepcopy(norm)(c * normal(20, 6, seed=30), raw(20)) for c in (1.0, 3.0)]
    difference = float((outs[0] - outs[1]).abs().max())
    # roundings of fp64, or a function that differs visibly
    assert difference < 1e-12 if norm.scale_invariant else difference > 0.1


def test_evonorm_alone_replaces_the_activation() -> None:
    assert [name for name, norm in NORMS.items() if norm.replaces_activation] == ["evonorm_s0"]
    case, x = CASES["evonorm_s0"], normal(4, 5)
    block = MaskBlock(NoMask(), 5, 8, random_norm(case, (8,)), 0.0).double()
    out = block(x, raw(4)).detach()
    hidden = x @ block.linear.weight.detach().T
    # fp64 roundings in numbers below 100
    torch.testing.assert_close(out, reference(case, hidden, block.norm, raw(4)), rtol=1e-12, atol=1e-12)
    assert float(out.min()) < 0  # which no ReLU would leave
    assert not any(isinstance(module, nn.ReLU) for module in block.modules())


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("seednorm", {"heads": 3}, "seednorm: heads 3 does not divide a width of 8"),
        ("evonorm_s0", {"groups": 16}, "evonorm_s0: groups 16 does not divide a width of 8"),
    ],
)
@pytest.mark.parametrize("shape", [(8,), (3, 8)], ids=str)
def test_parts_that_do_not_divide_the_width(
    name: str, parameters: dict[str, Any], message: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_norm(name, shape, eps=EPS, **parameters)


def test_conditional_needs_the_instance() -> None:
    with pytest.raises(ValueError, match="needs the instance"):
        fresh(CASES["conditional"], (8,))(torch.zeros(2, 8))
    with pytest.raises(TypeError, match="instance_width"):
        NORMS["conditional"]((8,), eps=EPS)


@slots
def test_export_with_any_number_of_rows(case: Case, shape: tuple[int, ...]) -> None:
    norm = random_norm(case, shape, torch.float32).eval()
    any_rows = {0: torch.export.Dim.DYNAMIC}
    given = 2 if case.name == "conditional" else 1
    example = (normal(3, *shape).float(), raw(3, torch.float32))[:given]
    program = torch.export.export(norm, example, dynamic_shapes=(any_rows,) * given).module()
    for rows in (0, 1, 2, 7):
        inputs = (normal(rows, *shape, seed=1).float(), raw(rows, torch.float32))[:given]
        # the same operations, maybe decomposed: some ulps of fp32
        torch.testing.assert_close(program(*inputs), norm(*inputs), rtol=1e-6, atol=1e-6)
