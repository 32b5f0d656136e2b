"""Norms with running statistics against their published recurrences, written out in numpy fp64.

Legend: B rows, F fields, d embedding width, h hidden width. Inputs are [B, F, d] with an affine (F, d), or [B, h].
In the references x, y, dx, dy are of a step's rows, g = γ ⊙ dy and z is the normalized x before its affine.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn import functional

from masknet.norms import make_norm, set_progress
from masknet.norms.base import Norm
from masknet.norms.running import set_accumulation

EPS = 1e-5
SHAPES = [(3, 5), (7,)]

Array = np.ndarray
Arrays = dict[str, np.ndarray]
Gradients = tuple[Array, Array, Arrays]  # y, dx, and the parameters' gradients by name


# The definitions. Each reference has the norm's running state by the names of its buffers, and two methods.


class Batch:
    """arXiv 1502.03167, and torch's unbiased running variance; the first steps count alike."""

    def __init__(self, shape: tuple[int, ...], *, momentum: float = 0.1) -> None:
        self.momentum = momentum
        self.state: Arrays = {"steps": np.array(0), "running_mean": np.zeros(shape), "running_var": np.ones(shape)}

    def step(self, x: Array, dy: Array, parameters: Arrays) -> Gradients:
        rows, mean, variance = len(x), x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
        r, g = (variance + EPS) ** -0.5, parameters["weight"] * dy
        z = (x - mean) * r
        dx = r * (g - g.mean(0) - z * (g * z).mean(0))
        if rows > 1:
            self.state["steps"] = self.state["steps"] + 1
            share = max(self.momentum, 1 / self.state["steps"])
            for key, new in (("running_mean", mean), ("running_var", variance * rows / (rows - 1))):
                self.state[key] = (1 - share) * self.state[key] + share * new
        return parameters["weight"] * z + parameters["bias"], dx, {"weight": (dy * z).sum(0), "bias": dy.sum(0)}

    def evaluate(self, x: Array, parameters: Arrays) -> Array:
        z = (x - self.state["running_mean"]) / np.sqrt(self.state["running_var"] + EPS)
        return parameters["weight"] * z + parameters["bias"]


class Power:
    """arXiv 2003.07845: PN-V, and algorithm 2 once warm-up is over, with Γ held to 1/(1 − α_b)."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        alpha: float = 0.9,
        alpha_backward: float = 0.9,
        warmup_steps: int = 100,
        group_scaling: int | None = None,
    ) -> None:
        self.alpha, self.new, self.warmup, self.groups = alpha, 1 - alpha_backward, warmup_steps, group_scaling
        self.state: Arrays = {
            "steps": np.array(0),
            "running_power": np.ones(shape),
            "ema_gradient": np.zeros(shape),
        }

    def scaled(self, x: Array) -> tuple[Array, Callable[[Array], Array]]:
        """x with each part of a row over its root mean square, and the way back of a gradient."""
        if self.groups is None:
            return x, lambda g: g
        split = (*x.shape[:-1], self.groups, -1)
        r = ((x.reshape(split) ** 2).mean(-1, keepdims=True) + EPS) ** -0.5
        unit = x.reshape(split) * r

        def back(g: Array) -> Array:
            parts = g.reshape(split)
            return (r * (parts - unit * (parts * unit).mean(-1, keepdims=True))).reshape(x.shape)

        return unit.reshape(x.shape), back

    def step(self, x: Array, dy: Array, parameters: Arrays) -> Gradients:
        x, back = self.scaled(x)
        power, nu, g = (x**2).mean(0), self.state["ema_gradient"], parameters["weight"] * dy
        warming_up = self.state["steps"] < self.warmup
        psi = np.sqrt((power if warming_up else self.state["running_power"]) + EPS)
        z = x / psi
        gamma, product = (z**2).mean(0), (g * z).mean(0)
        dx = (g - (product if warming_up else nu) * z) / psi
        self.state["steps"] = self.state["steps"] + 1
        share = max(1 - self.alpha, 1 / self.state["steps"])
        self.state["running_power"] = (1 - share) * self.state["running_power"] + share * power
        self.state["ema_gradient"] = nu * (1 - self.new * np.minimum(gamma, 1 / self.new)) + self.new * product
        return parameters["weight"] * z + parameters["bias"], back(dx), {"weight": (dy * z).sum(0), "bias": dy.sum(0)}

    def evaluate(self, x: Array, parameters: Arrays) -> Array:
        z = self.scaled(x)[0] / np.sqrt(self.state["running_power"] + EPS)
        return parameters["weight"] * z + parameters["bias"]


class PowerV(Power):
    """PN-V: a warm-up without end, whose ν nothing reads."""

    def __init__(self, shape: tuple[int, ...], *, alpha: float = 0.9) -> None:
        super().__init__(shape, alpha=alpha, warmup_steps=10**9)


class Unified:
    """arXiv 2208.01313 with the changes that UnifiedNorm names: logarithms of eps at least, the ratio free with v."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        window: int = 4,
        alpha: float = 0.9,
        warmup_steps: int = 100,
        outlier_filtering: bool = False,
    ) -> None:
        self.window, self.alpha, self.warmup, self.filtering = window, alpha, warmup_steps, outlier_filtering
        self.smoothed = self.skipped = 0
        self.state: Arrays = {
            "steps": np.array(0),
            "running_power": np.ones(shape),
            "ema_gradient": np.zeros(shape),
            "power_window": np.zeros((window, *shape)),
            "gradient_window": np.zeros((window, *shape)),
        }

    def step(self, x: Array, dy: Array, parameters: Arrays) -> Gradients:
        running, powers, products = (self.state[k] for k in ("running_power", "power_window", "gradient_window"))
        ema, power = self.state["ema_gradient"], (x**2).mean(0)
        self.state["steps"] = step = self.state["steps"] + 1
        slot = int(step) % self.window
        smooth, skip = bool(step > self.window and step >= self.warmup), False
        threshold = self.window * np.sqrt(powers).var(ddof=1)
        powers[slot] = v = power
        if smooth:
            geometric = np.exp(np.log(np.maximum(powers, EPS)).mean(0))
            skip = self.filtering and bool((powers.mean(0) - geometric > threshold).any())
            v = power if skip else geometric
            if skip:
                powers[slot] = running
        self.smoothed, self.skipped = self.smoothed + smooth - skip, self.skipped + skip
        root = np.sqrt(v + EPS)
        ratio = np.clip(root / np.sqrt(running + EPS), 1 / 5, 5) if smooth and not skip else np.ones_like(v)
        share = max(1 - self.alpha, 1 / step)
        self.state["running_power"] = (1 - share) * running + share * v
        z, g = x / root, parameters["weight"] * dy * ratio
        product = (g * z).mean(0)
        products[slot] = ema if skip else product
        mean = products.mean(0) if smooth and not skip else product
        self.state["ema_gradient"] = self.alpha * ema + (1 - self.alpha) * mean
        dx = (g - (mean if skip else self.state["ema_gradient"]) * z) / root
        dweight = (dy * ratio * z).sum(0)
        return parameters["weight"] * z + parameters["bias"], dx, {"weight": dweight, "bias": dy.sum(0)}

    def evaluate(self, x: Array, parameters: Arrays) -> Array:
        return parameters["weight"] * x / np.sqrt(self.state["running_power"] + EPS) + parameters["bias"]


class PRepBatch:
    """arXiv 2405.11582: λ · LN(x) + (1 − λ) · (BN(x) + η x)."""

    def __init__(
        self, shape: tuple[int, ...], *, warm: float = 0.05, until: float = 0.8, momentum: float = 0.1
    ) -> None:
        self.warm, self.until, self.batch, self.blend = warm, until, Batch(shape, momentum=momentum), 1.0

    @property
    def state(self) -> Arrays:
        return {"blend": np.array(self.blend), **{f"batch.{key}": value for key, value in self.batch.state.items()}}

    def progress(self, done: float) -> None:
        if done <= self.warm:
            self.blend = 1.0
        else:
            self.blend = 0.0 if done >= self.until else (self.until - done) / (self.until - self.warm)

    def layer(self, x: Array, dy: Array, weight: Array, bias: Array) -> Gradients:
        r = (x.var(-1, keepdims=True) + EPS) ** -0.5
        z, g = (x - x.mean(-1, keepdims=True)) * r, weight * dy
        dx = r * (g - g.mean(-1, keepdims=True) - z * (g * z).mean(-1, keepdims=True))
        return weight * z + bias, dx, {"layer.weight": (dy * z).sum(0), "layer.bias": dy.sum(0)}

    def step(self, x: Array, dy: Array, parameters: Arrays) -> Gradients:
        of_batch = {key: parameters[f"batch.{key}"] for key in ("weight", "bias")}
        y, dx, grads = self.batch.step(x, (1 - self.blend) * dy, of_batch)
        of_layer = self.layer(x, self.blend * dy, parameters["layer.weight"], parameters["layer.bias"])
        slope, linear = parameters["slope"], (1 - self.blend) * dy
        return (
            self.blend * of_layer[0] + (1 - self.blend) * (y + slope * x),
            dx + of_layer[1] + slope * linear,
            {**{f"batch.{k}": v for k, v in grads.items()}, **of_layer[2], "slope": (linear * x).sum()},
        )

    def evaluate(self, x: Array, parameters: Arrays) -> Array:
        of_batch = {key: parameters[f"batch.{key}"] for key in ("weight", "bias")}
        linear = self.batch.evaluate(x, of_batch) + parameters["slope"] * x
        layer = self.layer(x, x, parameters["layer.weight"], parameters["layer.bias"])[0]
        return self.blend * layer + (1 - self.blend) * linear


Reference = Batch | Power | Unified | PRepBatch
REFERENCES: dict[str, Any] = {
    "batch": Batch,
    "power_v": PowerV,
    "power": Power,
    "unified": Unified,
    "prepbn": PRepBatch,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "batch": ("batch", {}),
    "batch, own momentum": ("batch", {"momentum": 0.3}),
    "power_v": ("power_v", {}),
    "power in warm-up": ("power", {}),
    "power": ("power", {"warmup_steps": 5}),
    "power, no warm-up": ("power", {"warmup_steps": 0, "alpha": 0.8, "alpha_backward": 0.7}),
    "power, one group": ("power", {"warmup_steps": 5, "group_scaling": 1}),
    "unified in warm-up": ("unified", {}),
    "unified": ("unified", {"warmup_steps": 10}),
    "unified, outliers": ("unified", {"warmup_steps": 10, "outlier_filtering": True}),
    "unified, no warm-up": ("unified", {"warmup_steps": 0, "alpha": 0.8, "window": 2}),
    "prepbn": ("prepbn", {}),
    "prepbn, own schedule": ("prepbn", {"warm": 0.2, "until": 0.5, "momentum": 0.3}),
}
FOLDING = [case for case in CASES if "group" not in case]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return request.param


def build(case: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Norm, Reference]:
    """The norm with random parameters, one channel's negative and one's zero, and its reference."""
    name, parameters = CASES[case]
    norm, rng = make_norm(name, shape, eps=EPS, **parameters).to(dtype), np.random.default_rng(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            value = rng.normal(1, 0.5, parameter.shape)
            if value.ndim:
                value.flat[:2] = (-0.7, 0.0)
            parameter.copy_(torch.from_numpy(value))
    return norm, REFERENCES[name](shape, **parameters)


def parameters_of(norm: Norm) -> Arrays:
    return {key: value.detach().double().numpy() for key, value in norm.named_parameters()}


def state_of(norm: Norm) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in norm.named_buffers()}


def some_rows(rng: np.random.Generator, rows: int, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Rows with a mean and a spread of the step's own, and upstream gradients that go along with them."""
    x = np.exp(rng.normal(0, 0.3)) * (rng.normal(size=(rows, *shape)) + 0.5)
    return x, rng.normal(size=(rows, *shape)) + 0.3 * x


def step(norm: Norm, x: Array | torch.Tensor, dy: Array | torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The norm's output, and its gradients by the parameters' names and `x`."""
    x, dy = torch.as_tensor(x).requires_grad_(), torch.as_tensor(dy)
    out = norm(x)
    leaves = {"x": x, **dict(norm.named_parameters())}
    return out.detach(), dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dy), strict=True))


def progress(norm: Norm, reference: Reference, done: float) -> None:
    norm.set_progress(done)
    if isinstance(reference, PRepBatch):
        reference.progress(done)


def trained(case: str, shape: tuple[int, ...], rows: int = 9) -> tuple[Norm, Reference, np.random.Generator]:
    """Both after a dozen steps, the blend of prepbn at a half, and random numbers for what follows."""
    norm, reference = build(case, shape)
    rng = np.random.default_rng(1)
    progress(norm, reference, 0.425 if case == "prepbn" else 0.35)
    for _ in range(12):
        x, dy = some_rows(rng, rows, shape)
        step(norm, x, dy)
        reference.step(x, dy, parameters_of(norm))
    return norm, reference, rng


def close(actual: torch.Tensor, expected: Array | torch.Tensor, tolerance: float = 1e-12) -> None:
    """By default for numbers below a thousand or so that fp64 sums of a dozen terms lead to."""
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), rtol=tolerance, atol=tolerance)


def close_states(norm: Norm, reference: Reference, tolerance: float = 1e-12) -> None:
    state = state_of(norm)
    assert set(state) <= set(reference.state)
    for key, value in state.items():
        close(value, reference.state[key], tolerance)


def test_fifty_steps(case: str, shape: tuple[int, ...]) -> None:
    norm, reference = build(case, shape)
    rng = np.random.default_rng(2)
    for t in range(50):
        x, dy = some_rows(rng, (1, 12, 6, 31)[t % 4], shape)
        if t % 11 == 10:
            x[..., 1] *= 4  # what outlier filtering is for
        if t == 37:
            x[..., 0] = 0  # a channel that is silent for a step
        progress(norm, reference, t / 50)
        out, gradients = step(norm, x, dy)
        y, dx, expected = reference.step(x, dy, parameters_of(norm))
        close(out, y)
        # a gradient is divided by roots down to √eps = .003, which makes its roundings larger
        close(gradients.pop("x"), dx, 1e-11)
        assert set(gradients) == set(expected)
        for key, value in expected.items():
            close(gradients[key], value, 1e-11)
        close_states(norm, reference)
    close(norm.eval()(torch.from_numpy(x)), reference.evaluate(x, parameters_of(norm)))
    if "outliers" in case:
        assert isinstance(reference, Unified)
        assert min(reference.skipped, reference.smoothed) >= 3, "both branches are to be taken"


def test_batch_is_torchs(shape: tuple[int, ...]) -> None:
    norm, _ = build("batch", shape)
    torchs = nn.BatchNorm1d(norm.weight.numel(), eps=EPS, dtype=torch.float64)
    torchs.load_state_dict({key: norm.state_dict()[key].flatten() for key in ("weight", "bias")}, strict=False)
    rng = np.random.default_rng(3)
    for t in range(1, 31):
        torchs.momentum = None if t <= 10 else 0.1  # None: an even mean, as the norm's is until 1/t is less than .1
        x, dy = (torch.from_numpy(value) for value in some_rows(rng, 12, shape))
        out, gradients = step(norm, x, dy)
        x = x.detach().flatten(1).requires_grad_()
        expected = torchs(x)
        dx, dweight, dbias = torch.autograd.grad(expected, [x, torchs.weight, torchs.bias], dy.flatten(1))
        pairs = [(out, expected), (gradients["x"], dx), (gradients["weight"], dweight), (gradients["bias"], dbias)]
        pairs += [(norm.running_mean, torchs.running_mean), (norm.running_var, torchs.running_var)]
        for ours, theirs in pairs:
            close(ours, theirs.detach().view(ours.shape))


def check_gradients(norm: Norm, x: torch.Tensor) -> bool:
    names = [key for key, _ in norm.named_parameters()]

    def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return functional_call(norm, dict(zip(names, parameters, strict=True)), (x,))

    return gradcheck(call, (x.requires_grad_(), *norm.parameters()))


@pytest.mark.parametrize("case", ["batch", "power_v", "power in warm-up", "prepbn"])
def test_training_gradients_that_are_exact(case: str, shape: tuple[int, ...]) -> None:
    norm, _, rng = trained(case, shape)
    if case == "power in warm-up":
        norm.warmup_steps = 10**9  # gradcheck is as many steps as there are numbers
    assert check_gradients(norm, torch.from_numpy(some_rows(rng, 3, shape)[0]))


@pytest.mark.parametrize("case", ["batch", "power_v", "power", "power, one group", "unified", "prepbn"])
def test_evaluation_gradients(case: str, shape: tuple[int, ...]) -> None:
    norm, _, rng = trained(case, shape)
    assert check_gradients(norm.eval(), torch.from_numpy(some_rows(rng, 2, shape)[0]))


def test_power_warms_up_as_power_v(shape: tuple[int, ...]) -> None:
    power, power_v = build("power in warm-up", shape)[0], build("power_v", shape)[0]
    rng = np.random.default_rng(4)
    for _ in range(20):
        x, dy = some_rows(rng, 9, shape)
        results = [step(norm, x, dy) for norm in (power, power_v)]
        close(results[0][0], results[1][0])
        for key, value in results[1][1].items():
            close(results[0][1][key], value)
        assert torch.equal(power.running_power, power_v.running_power)


@pytest.mark.parametrize("alpha_backward", [0.9, 0.8])
def test_power_estimates_the_gradient_as_the_authors_code(alpha_backward: float) -> None:
    """ν = (1 − α_b) s, with their ĝ = g − (1 − α_b) s z and s ← s + mean(ĝ z)."""
    norm = make_norm("power", (7,), eps=EPS, warmup_steps=0, alpha_backward=alpha_backward).double()
    rng, s, power, new = np.random.default_rng(5), np.zeros(7), np.ones(7), 1 - alpha_backward
    for t in range(1, 51):
        x, dy = rng.normal(0.5, 1, (40, 7)), rng.normal(0.3, 1, (40, 7))
        z = x / np.sqrt(power + EPS)
        assert ((z**2).mean(0) < 1 / new).all(), "below the guard, which their code does not have"
        s = s + ((dy - new * s * z) * z).mean(0)
        share = max(0.1, 1 / t)
        power = (1 - share) * power + share * (x**2).mean(0)
        step(norm, x, dy)
        close(norm.ema_gradient, new * s)


def test_power_survives_a_silent_channel_that_wakes_up() -> None:
    norm = make_norm("power", (2,), eps=EPS, alpha=0.999).double()
    norm.steps.fill_(10_000)  # long after the start, where a running mean is slow
    norm.running_power.fill_(1e-6)
    rng, power, unguarded, moved = np.random.default_rng(6), np.full(2, 1e-6), np.zeros(2), np.zeros(2)
    for t in range(80):
        x, dy = (1e-3 if t < 20 else 1.0) * rng.normal(size=(50, 2)), rng.normal(size=(50, 2))
        psi = np.sqrt(power + EPS)
        z = x / psi
        before = np.abs(norm.ema_gradient.numpy())
        _, gradients = step(norm, x, dy)
        assert (np.abs(gradients["x"].numpy()) <= (np.abs(dy) + before * np.abs(z)) / psi * (1 + 1e-12)).all()
        unguarded = unguarded * (1 - 0.1 * (z**2).mean(0)) + 0.1 * (dy * z).mean(0)
        # what is kept is a share from 0 to 1, so that ν is no more than all that was ever added
        moved += 0.1 * np.abs((dy * z).mean(0))
        assert (np.abs(norm.ema_gradient.numpy()) <= moved).all()
        power = 0.999 * power + 0.001 * (x**2).mean(0)
    assert (np.abs(unguarded) > 1e10).all()
    assert (moved < 100).all()


def test_unified_does_not_explode_after_a_silent_step() -> None:
    norm, rng = make_norm("unified", (2,), eps=EPS, warmup_steps=5).double(), np.random.default_rng(7)
    largest = []
    for t in range(20):
        x = rng.normal(size=(200, 2))
        x[:, 0] *= t != 10
        largest.append(float(step(norm, x, x)[0][:, 0].abs().max()))
    assert largest[10] == 0.0
    # (eps · 1 · 1 · 1)^(1/4) instead of 1 under the root makes 4.2 of 1, and 200 normal numbers are below 4.5
    assert max(largest) < 4.2 * 4.5


@pytest.mark.parametrize("groups", [2, 3])
def test_power_scales_groups_first(groups: int) -> None:
    shape = (2, 6)
    norm = make_norm("power", shape, eps=EPS, warmup_steps=3, group_scaling=groups).double()
    reference, rng = Power(shape, warmup_steps=3, group_scaling=groups), np.random.default_rng(8)
    for _ in range(6):
        x, dy = some_rows(rng, 5, shape)
        out, gradients = step(norm, x, dy)
        y, dx, _ = reference.step(x, dy, parameters_of(norm))
        close(out, y)
        close(gradients["x"], dx)
        close_states(norm, reference)
    close(norm.eval()(torch.from_numpy(x)), reference.evaluate(x, parameters_of(norm)))
    assert norm.fold() is None


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("power", {"group_scaling": 4}, "group_scaling 4 does not divide a width of 7"),
        ("unified", {"window": 1}, "a window of 1 smooths nothing"),
        ("prepbn", {"warm": 0.5, "until": 0.5}, "warm 0.5 must be less than until 0.5"),
        ("prepbn", {"warm": 0.9}, "warm 0.9 must be less than until 0.8"),
    ],
)
def test_refused(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_norm(name, (7,), eps=EPS, **parameters)


@pytest.mark.parametrize(
    ("done", "blend"), [(0.0, 1.0), (0.1, 1.0), (0.2, 0.8), (0.35, 0.5), (0.6, 0.0), (0.61, 0.0), (1.0, 0.0)]
)
def test_prepbn_anneals(done: float, blend: float) -> None:
    norm = make_norm("prepbn", (7,), eps=EPS, warm=0.1, until=0.6).double()
    set_progress(nn.Sequential(norm), done)
    assert float(norm.blend) == pytest.approx(blend, abs=1e-15)  # a rounding of fp64 below 1
    assert (norm.fold() is None) == (blend > 0)


@pytest.mark.parametrize("case", FOLDING)
def test_evaluation_is_the_affine_that_fold_tells(case: str, shape: tuple[int, ...]) -> None:
    norm, reference = build(case, shape)
    rng = np.random.default_rng(9)
    for _ in range(15):
        x, dy = some_rows(rng, 9, shape)
        channels = x.reshape(9, -1)
        channels[:, 0], channels[:, 2], channels[:, 4] = 0.0, 3.0, 0.0  # dead, constant, dead: γ < 0, > 0, > 0
        step(norm, x, dy)
        reference.step(x, dy, parameters_of(norm))
    progress(norm, reference, 1.0)
    affine, x = norm.eval().fold(), some_rows(rng, 20, shape)[0]
    assert affine is not None
    assert not affine.scale.requires_grad
    assert not affine.shift.requires_grad
    expected = reference.evaluate(x, parameters_of(norm))
    # up to 1/√eps = 316 times fp64 roundings in numbers below 10
    close(norm(torch.from_numpy(x)), expected)
    close(affine.scale * torch.from_numpy(x) + affine.shift, expected)


def test_evaluation_looks_at_one_row_and_keeps_the_state(case: str, shape: tuple[int, ...]) -> None:
    norm, reference, rng = trained(case, shape)
    norm.eval()
    before, (x, dy) = state_of(norm), some_rows(rng, 6, shape)
    out, _ = step(norm, x, dy)
    with torch.no_grad():
        changed = torch.from_numpy(x) * torch.tensor([1.0, 1, 1, -50, 0, 1e3]).view(-1, *[1] * len(shape))
        assert torch.equal(norm(changed)[:3], out[:3])
        # a vectorized loop may take a lone row in another order: roundings of fp64
        close(norm(torch.from_numpy(x[4:5])), out[4:5], 1e-13)
    close(out, reference.evaluate(x, parameters_of(norm)))
    assert norm(torch.from_numpy(x[:0])).shape == (0, *shape)
    after = state_of(norm)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def through_a_file(norm: Norm, case: str) -> Norm:
    fresh, _ = build(case, norm.shape)
    fresh.load_state_dict(load(save(norm.state_dict())))
    return fresh


@pytest.mark.parametrize("again", [through_a_file, lambda norm, case: copy.deepcopy(norm)], ids=["file", "deepcopy"])
def test_a_copy_goes_on_the_same(case: str, shape: tuple[int, ...], again: Callable[[Norm, str], Norm]) -> None:
    norm, _, rng = trained(case, shape)
    other = again(norm, case)
    for _ in range(10):
        x, dy = some_rows(rng, 9, shape)
        (out, gradients), (other_out, other_gradients) = step(norm, x, dy), step(other, x, dy)
        assert torch.equal(out, other_out)
        assert all(torch.equal(other_gradients[key], value) for key, value in gradients.items())
    state = other.state_dict()
    assert all(torch.equal(state[key], value) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 6, 5), (0, 5, 7), (12, 0, 0)], ids=str)
def test_accumulated_batches_move_the_state_as_one(case: str, shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    norm, _, rng = trained(case, shape)
    whole = copy.deepcopy(norm)
    set_accumulation(nn.Sequential(norm), len(sizes))
    # where a batch is normalized by its own statistics, so are the gradients and what is kept of them
    exact = case in ("power", "power, no warm-up", "power, one group")
    for spike in (1.0, 5.0, 1.0):
        x, dy = some_rows(rng, sum(sizes), shape)
        x[..., 1] *= spike
        _, expected = step(whole, x, dy)
        before, parts = state_of(norm), []
        for part in range(len(sizes)):
            assert all(torch.equal(value, before[key]) for key, value in state_of(norm).items())
            rows = slice(sum(sizes[:part]), sum(sizes[: part + 1]))
            parts.append(step(norm, x[rows], dy[rows])[1])
        for key, value in state_of(whole).items():
            if exact or "gradient" not in key:
                close(state_of(norm)[key], value)
        if exact:
            close(torch.cat([part.pop("x") for part in parts]), expected.pop("x"))
            for key, value in expected.items():
                close(torch.stack([part[key] for part in parts]).sum(0), value)


@pytest.mark.parametrize("batches", [1, 2])
def test_empty_batch(case: str, shape: tuple[int, ...], batches: int) -> None:
    norm, _, _ = trained(case, shape)
    set_accumulation(norm, batches)
    before, nothing = state_of(norm), torch.empty(0, *shape, dtype=torch.float64)
    for _ in range(batches):
        out, gradients = step(norm, nothing, nothing)
        assert out.shape == gradients.pop("x").shape == (0, *shape)
        assert not any(gradient.any() for gradient in gradients.values())
    after = state_of(norm)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("trained_before", [False, True])
def test_batch_norm_of_one_row(shape: tuple[int, ...], trained_before: bool) -> None:
    norm = trained("batch", shape)[0] if trained_before else build("batch", shape)[0]
    before, x = state_of(norm), torch.full((1, *shape), 3.0, dtype=torch.float64)
    out, gradients = step(norm, x, torch.ones_like(x))
    assert torch.equal(out[0], norm.bias)
    assert not gradients["x"].any()
    assert all(torch.equal(value, before[key]) for key, value in state_of(norm).items())


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_rows(case: str, shape: tuple[int, ...], value: float) -> None:
    norm, reference = build(case, shape)
    progress(norm, reference, 0.35)
    rng, x = np.random.default_rng(10), np.full((8, *shape), value)
    for _ in range(14):
        dy = rng.normal(size=x.shape)
        out, gradients = step(norm, x, dy)
        y, dx, _ = reference.step(x, dy, parameters_of(norm))
        close(out, y)
        close(gradients["x"], dx, 1e-11)  # divided by √eps
        close_states(norm, reference)


def eager(name: str, x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The norm's first step in torch's own operators and x's precision."""
    p = {key: value.detach().to(x.dtype) for key, value in norm.named_parameters()}
    if name in ("batch", "prepbn"):
        weight, bias = (p[key if name == "batch" else f"batch.{key}"].flatten() for key in ("weight", "bias"))
        batch = functional.batch_norm(x.flatten(1), None, None, weight, bias, training=True, eps=EPS).view_as(x)
        if name == "batch":
            return batch
        layer = functional.layer_norm(x, x.shape[-1:], eps=EPS) * p["layer.weight"] + p["layer.bias"]
        return torch.lerp(batch + p["slope"] * x, layer, 0.5)
    return x * torch.rsqrt(x.square().mean(0) + EPS) * p["weight"] + p["bias"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(39, 10), (37,)], ids=str)
@pytest.mark.parametrize("case", ["batch", "power_v", "power in warm-up", "unified in warm-up", "prepbn"])
def test_low_precision(case: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm, reference = build(case, shape, torch.float32)
    with torch.no_grad():  # rounded to dtype, so that all three read the same numbers
        for parameter in norm.parameters():
            parameter.copy_(parameter.to(dtype))
    progress(norm, reference, 0.425)  # prepbn: half and half
    x, dy = (torch.from_numpy(value).to(dtype) for value in some_rows(np.random.default_rng(11), 64, shape))
    out, gradients = step(norm, x, dy)
    assert (out.dtype, gradients["x"].dtype) == (dtype, dtype)
    y, _, _ = reference.step(x.detach().double().numpy(), dy.double().numpy(), parameters_of(norm))
    expected = torch.from_numpy(y)
    error = (out.double() - expected).abs()
    eager_error = (eager(CASES[case][0], x.detach(), norm).double() - expected).abs()
    # the project's rule for a low precision: at most twice the error of eager torch in it
    assert float(error.max()) <= 2 * float(eager_error.max())
    assert float(error.square().mean().sqrt()) <= 2 * float(eager_error.square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_state_is_fp32_under_inputs_whose_squares_overflow(case: str, dtype: torch.dtype) -> None:
    norm, reference = build(case, (7,), torch.float32)
    rng = np.random.default_rng(12)
    for _ in range(15):
        x, dy = (torch.from_numpy(value).to(dtype) for value in some_rows(rng, 16, (7,)))
        x = (x * 5e3).detach()
        out, gradients = step(norm, x, dy)
        y, _, expected = reference.step(x.detach().double().numpy(), dy.double().numpy(), parameters_of(norm))
        # a rounding of the result to dtype, of numbers below 16
        close(out, y, torch.finfo(dtype).eps)
        for key, value in expected.items():
            # roundings of dtype in z would show as 1e-3 here; fp32 sums of 16 terms, which may cancel, do not
            close(gradients[key], value, 1e-4)
    assert all(value.dtype == torch.float32 for key, value in state_of(norm).items() if "steps" not in key)
    for key, value in state_of(norm).items():
        # roundings of fp32, and where a difference is formed or a gradient was divided, tens of them
        torch.testing.assert_close(value.double(), torch.as_tensor(reference.state[key]).double(), rtol=1e-5, atol=1e-5)


def test_non_contiguous_input_and_gradient(case: str, shape: tuple[int, ...]) -> None:
    norm, _, rng = trained(case, shape)
    other = copy.deepcopy(norm)
    x, dy = (torch.from_numpy(rng.normal(size=(*shape, 9))).movedim(-1, 0) for _ in range(2))
    assert not x.is_contiguous()
    strided, dense = step(norm, x, dy), step(other, x.detach().contiguous(), dy.contiguous())
    # sums in another order: fp64 roundings in numbers below 100
    close(strided[0], dense[0])
    for key, value in dense[1].items():
        close(strided[1][key], value)
    for key, value in state_of(other).items():
        close(state_of(norm)[key], value)


def test_export(case: str, shape: tuple[int, ...]) -> None:
    norm, _, rng = trained(case, shape)
    x = torch.from_numpy(some_rows(rng, 6, shape)[0])
    exported = torch.export.export(norm.eval(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows")}})
    for rows in (1, 6, 11):
        other = torch.from_numpy(some_rows(rng, rows, shape)[0])
        # the same operators, which may be put together: a rounding of fp64
        close(exported.module()(other), norm(other).detach(), 1e-14)


def test_the_count_of_steps_follows_whatever_changes_it() -> None:
    norm = make_norm("batch", (3,), eps=EPS).train()
    for expected in (1, 2):
        norm(torch.randn(4, 3))
        assert norm.num_steps == int(norm.steps) == expected
    other = copy.deepcopy(norm)
    other(torch.randn(4, 3))
    assert (norm.num_steps, other.num_steps) == (2, 3)
    norm.steps.fill_(70)
    assert norm.num_steps == 70
    norm.load_state_dict(other.state_dict())
    assert norm.num_steps == 3
    assert norm.double().num_steps == int(norm.steps) == 3


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_copy_counts_its_own_steps(steps: int) -> None:
    long, short = (make_norm("power", (3,), eps=EPS).train() for _ in range(2))
    for norm, count in ((long, 70), (short, steps)):
        for _ in range(count):
            norm(torch.randn(4, 3))
    copied = copy.deepcopy(short)
    copied.load_state_dict(long.state_dict())
    assert copied.num_steps == int(copied.steps) == 70


def test_steps_are_counted_whatever_mode_a_norm_was_made_in() -> None:
    with torch.inference_mode():
        norm = make_norm("batch", (3,), eps=EPS).train()
        norm(torch.randn(4, 3))
        assert norm.num_steps == 1
        norm(torch.randn(4, 3))
        assert norm.num_steps == int(norm.steps) == 2
