"""Curvature against dense Hessians and closed forms, the loss surface against losses computed by hand, and its picture.

Legend: B rows, F fields, d embedding width, P parameters, K grid points of an axis.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import astuple
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from masknet.config import MaskNetConfig
from masknet.networks import build_network
from training.ablation.landscape import Curvature, Surface, curvature, surface
from training.ablation.pictures_landscape import landscape_picture

F, D_FIELD, B = 2, 3, 40
NORMS = ["layer", "rms", "none"]
KINDS = ["serial", "parallel"]

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For matrices of a few numbers a second thread only waits for a core: minutes of it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows() -> Rows:
    random = torch.Generator().manual_seed(3)
    emb_BFd = torch.randn(B, F, D_FIELD, generator=random, dtype=torch.float64)
    label_B = torch.randint(0, 2, (B,), generator=random).double()
    return emb_BFd, label_B, torch.rand(B, generator=random, dtype=torch.float64) + 0.1


def tiny(kind: str, norm: str, eps: float = 1e-5, dropout: float = 0.0) -> nn.Module:
    slot = {"name": norm, "eps": eps}
    sizes = {"embedding_dim": D_FIELD, "blocks": 2, "block_width": 4, "reduction_ratio": 0.5}
    config = {"kind": kind, "head": (3,) if kind == "parallel" else (), "dropout": dropout, **sizes}
    network = build_network(MaskNetConfig.model_validate({**config, "embedding_norm": slot, "hidden_norm": slot}), F)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "norm" not in name:  # norms' affines draw nothing, so the other weights are alike for every norm
                weight.normal_(generator=random)
    return network.double()


def loss_at(network: nn.Module, weights: dict[str, torch.Tensor], data: Rows) -> torch.Tensor:
    """Weighted mean of log(1 + eᶻ) − y·z."""
    emb_BFd, label_B, weight_B = data
    logit_B = functional_call(network, weights, (emb_BFd,))
    return (weight_B * (torch.logaddexp(logit_B, torch.zeros_like(logit_B)) - label_B * logit_B)).sum() / weight_B.sum()


def dense_hessian(network: nn.Module, data: Rows) -> torch.Tensor:
    """H [P, P]."""
    names = [name for name, _ in network.named_parameters()]
    weights = tuple(weight.detach() for weight in network.parameters())

    def loss(*moved: torch.Tensor) -> torch.Tensor:
        return loss_at(network, dict(zip(names, moved, strict=True)), data)

    parts = torch.autograd.functional.hessian(loss, weights)
    sizes = [weight.numel() for weight in weights]
    lines = [
        torch.cat([part.reshape(height, width) for part, width in zip(line, sizes, strict=True)], dim=1)
        for line, height in zip(parts, sizes, strict=True)
    ]
    return torch.cat(lines)


def filter_norms(network: nn.Module) -> torch.Tensor:
    """The diagonal of D [P], row by row."""
    norms = []
    for weight in network.parameters():
        for row in weight.detach() if weight.ndim == 2 else [weight.detach()]:
            norms += [math.sqrt(math.fsum(value * value for value in row.tolist()))] * len(row)
    return torch.tensor(norms, dtype=torch.float64)


# Curvature.


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_curvature_of_networks(kind: str, norm: str) -> None:
    network, data, probes = tiny(kind, norm), rows(), 200
    raw = dense_hessian(network, data)
    norm_P = filter_norms(network)
    found = curvature(network, *data, probes=probes)
    assert (found.rows, found.parameters) == (B, len(raw))
    pairs = [(found.largest, found.largest_error, found.trace, found.trace_error)]
    pairs += [astuple(found)[4:8]]
    for hessian, (largest, bound, trace, error) in zip([raw, norm_P[:, None] * raw * norm_P], pairs, strict=True):
        expected = float(torch.linalg.eigvalsh(hessian)[-1])
        assert bound < 1e-3 * expected  # 40 steps are enough for the bound to say something
        assert abs(largest - expected) <= bound + 1e-12 * expected
        assert abs(trace - float(hessian.trace())) < 4 * error
        # variance of one probe: 2 Σ H_ij² off the diagonal; the error's own relative error is about 1/√400
        off = hessian - torch.diag(hessian.diagonal())
        assert error == pytest.approx(math.sqrt(2 * float(off.square().sum()) / probes), rel=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_curvature_by_all_steps_is_exact(kind: str) -> None:
    network, data = tiny(kind, "layer"), rows()
    found = curvature(network, *data, probes=2, lanczos_steps=1000)
    expected = float(torch.linalg.eigvalsh(dense_hessian(network, data))[-1])
    assert found.largest == pytest.approx(expected, rel=1e-11)
    assert found.largest_error < 1e-11 * expected


class Bowl(nn.Module):
    """Logits ½ wᵀAw at w = 0: with labels of 0 the Hessian of the loss is A / 2."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.w = nn.Parameter(torch.zeros(len(matrix), dtype=torch.float64))

    def forward(self, emb_BFd: torch.Tensor) -> torch.Tensor:
        return (0.5 * self.w @ self.matrix @ self.w).expand(len(emb_BFd))


def in_bowl(spectrum: list[float], **options: int) -> Curvature:
    random = torch.Generator().manual_seed(1)
    turn, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=random, dtype=torch.float64))
    matrix = turn @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ turn.T
    emb_BFd, label_B, weight_B = rows()
    return curvature(Bowl(matrix), emb_BFd, 0 * label_B, weight_B, **options)


@pytest.mark.parametrize(
    "spectrum",
    [[3.0, -10.0, 1.0, 0.5, 0.0, -2.0], [-1.0, -2.0, -5.0], [4.0, 4.0, 4.0, 1.0], [2.0] * 6, [7.0], [0.0] * 4],
    ids=["mixed", "negative", "degenerate", "one value", "one parameter", "flat"],
)
def test_curvature_of_a_known_spectrum(spectrum: list[float]) -> None:
    found = in_bowl(spectrum, probes=400)
    assert found.largest == pytest.approx(max(spectrum) / 2, abs=1e-12)
    assert found.largest_error < 1e-12
    assert abs(found.trace - sum(spectrum) / 2) <= 4 * found.trace_error + 1e-12
    # a filter of zeros has no relative coordinate
    assert astuple(found)[4:8] == (0.0, 0.0, 0.0, 0.0)


def test_few_lanczos_steps_say_how_far_off_they_may_be() -> None:
    spectrum = np.linspace(0.0, 2.0, 60).tolist()
    errors = []
    for steps in (3, 8, 20, 60):
        found = in_bowl(spectrum, probes=2, lanczos_steps=steps)
        assert found.largest <= 1.0 + 1e-12
        assert min(abs(found.largest - value / 2) for value in spectrum) <= found.largest_error + 1e-12
        errors.append(1.0 - found.largest)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3


class Straight(nn.Module):
    """Logits from one linear layer over the flattened embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1, bias=False, dtype=torch.float64)

    def forward(self, emb_BFd: torch.Tensor) -> torch.Tensor:
        return self.linear(emb_BFd.flatten(1)).squeeze(-1)


def test_curvature_of_a_diagonal_hessian() -> None:
    size_P = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    network, weight_P = Straight(4), torch.tensor([4.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    found = curvature(network, torch.diag(size_P)[:, None], torch.ones(4, dtype=torch.float64), weight_P, probes=5)
    w_P = network.linear.weight.detach()[0]
    score_P = torch.sigmoid(size_P * w_P)
    diagonal_P = weight_P * size_P**2 * score_P * (1 - score_P) / weight_P.sum()
    relative = float(w_P.square().sum())  # one row, so D is its norm times the identity
    assert found.largest == pytest.approx(float(diagonal_P.max()), rel=1e-12)
    assert found.trace == pytest.approx(float(diagonal_P.sum()), rel=1e-12)
    assert found.trace_error < 1e-15  # every probe of a diagonal matrix gives its trace
    assert found.largest_normalized == pytest.approx(relative * found.largest, rel=1e-12)
    assert found.trace_normalized == pytest.approx(relative * found.trace, rel=1e-12)


@pytest.mark.parametrize("factor", [3.0, 0.1])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_normalized_curvature_does_not_see_the_scale_before_a_norm(norm: str, factor: float) -> None:
    network, data = tiny("serial", norm, eps=1e-18), rows()
    before = curvature(network, *data, lanczos_steps=200)
    with torch.no_grad():
        for block in network.blocks:
            block.linear.weight *= factor
    after = curvature(network, *data, lanczos_steps=200)
    # some rows' variances are near 1e-6, of which eps is 1e-12
    assert after.largest_normalized == pytest.approx(before.largest_normalized, rel=1e-8)
    assert after.trace_normalized == pytest.approx(before.trace_normalized, rel=1e-8)
    assert after.trace != pytest.approx(before.trace, rel=1e-3)
    assert after.largest != pytest.approx(before.largest, rel=1e-3)
    if factor < 1:  # smaller weights before a norm turn faster
        assert after.largest > 1.4 * before.largest


def test_curvature_in_fp32() -> None:
    network, data = tiny("parallel", "layer"), rows()
    expected = curvature(network, *data)
    emb_BFd, label_B, weight_B = (part.float() for part in data)
    found = curvature(network.float(), emb_BFd, label_B, weight_B)
    # products are off by some 1e-6 of the largest eigenvalue
    assert astuple(found)[:8] == pytest.approx(astuple(expected)[:8], rel=1e-4, abs=1e-5 * expected.largest)


def test_seed_chooses_the_probes() -> None:
    network, data = tiny("parallel", "layer"), rows()
    first, again, other = (curvature(network, *data, probes=4, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.trace != other.trace
    assert first.largest == pytest.approx(other.largest, rel=1e-6)


def test_frozen_weights_do_not_count() -> None:
    network = tiny("parallel", "layer")
    network.requires_grad_(False)
    network.logit.requires_grad_(True)
    assert curvature(network, *rows()).parameters == 4


def test_a_broken_network_is_nan() -> None:
    network = tiny("parallel", "layer")
    with torch.no_grad():
        network.logit.weight.fill_(math.nan)
    assert all(math.isnan(value) for value in astuple(curvature(network, *rows()))[:8])
    assert np.isnan(surface(network, *rows(), points=3).loss_KK).all()


# Surface.


def visited(network: nn.Module, **options: float) -> tuple[Surface, list[dict[str, torch.Tensor]]]:
    """The surface, and all weights at every one of its points."""
    points: list[dict[str, torch.Tensor]] = []

    def note(module: nn.Module, _inputs: tuple[torch.Tensor, ...]) -> None:
        points.append({name: weight.detach().clone() for name, weight in module.named_parameters()})

    with network.register_forward_pre_hook(note):
        return surface(network, *rows(), **options), points


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_surface_is_the_loss_at_its_points(kind: str, norm: str) -> None:
    network = tiny(kind, norm)
    base = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    found, points = visited(network, points=5, reach=0.7)
    np.testing.assert_allclose(found.axis_K, [-0.7, -0.35, 0.0, 0.35, 0.7], rtol=1e-15, atol=0)
    first = {name: (points[2 * 5 + 4][name] - weight) / 0.7 for name, weight in base.items()}
    second = {name: (points[4 * 5 + 2][name] - weight) / 0.7 for name, weight in base.items()}
    for i, y in enumerate(found.axis_K.tolist()):
        for j, x in enumerate(found.axis_K.tolist()):
            moved = {name: weight + x * first[name] + y * second[name] for name, weight in base.items()}
            assert found.loss_KK[i, j] == pytest.approx(float(loss_at(network, moved, rows())), rel=1e-12)
    assert found.loss_KK[2, 2] == pytest.approx(float(loss_at(network, base, rows())), rel=1e-15)
    assert found.loss_KK.std() > 0.01


@pytest.mark.parametrize("norm", NORMS)
def test_directions_are_as_long_as_the_weights_row_by_row(norm: str) -> None:
    network = tiny("parallel", norm)
    linears = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    _, points = visited(network, points=3)
    for at in (points[5], points[7]):  # a step of 1 along the first direction, and along the second
        for name, weight in network.named_parameters():
            if name in linears:
                lengths = (at[name] - weight.detach()).norm(dim=1)
                torch.testing.assert_close(lengths, weight.detach().norm(dim=1), rtol=1e-12, atol=0)
            else:
                assert torch.equal(at[name], weight)
    assert not torch.allclose(points[5]["logit.weight"], points[7]["logit.weight"])


def test_directions_are_alike_for_every_norm() -> None:
    paths = [visited(tiny("serial", norm), points=3, seed=4)[1] for norm in NORMS]
    for points in zip(*paths, strict=True):
        for name in points[2]:  # without norms, all that the three have in common
            assert torch.equal(points[0][name], points[2][name])
            assert torch.equal(points[1][name], points[2][name])
    other = visited(tiny("serial", "layer"), points=3, seed=5)[1]
    assert not torch.allclose(other[0]["logit.weight"], paths[0][0]["logit.weight"])


def test_a_loss_that_is_not_finite_is_nan() -> None:
    found = surface(tiny("serial", "none"), *rows(), points=3, reach=1e200)
    assert np.isfinite(found.loss_KK).tolist() == [[False] * 3, [False, True, False], [False] * 3]
    assert np.isnan(found.loss_KK).sum() == 8


@pytest.mark.parametrize("points", [0, 1, 2, 20])
def test_surface_needs_a_middle(points: int) -> None:
    with pytest.raises(ValueError, match=rf"odd and 3 or more.* {points}$"):
        surface(tiny("serial", "none"), *rows(), points=points)


# The network is left as it was.


class Stateful(nn.Module):
    """A network with running statistics and dropout around a layer that is already being evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(F * D_FIELD).eval()
        self.layers = nn.Sequential(nn.BatchNorm1d(F * D_FIELD), nn.Dropout(0.5), nn.Linear(F * D_FIELD, 1))

    def forward(self, emb_BFd: torch.Tensor) -> torch.Tensor:
        return self.layers(self.norm(emb_BFd.flatten(1))).squeeze(-1)


def measured(network: nn.Module) -> tuple[object, ...]:
    return (*astuple(curvature(network, *rows(), probes=2)), surface(network, *rows(), points=3).loss_KK.tolist())


def fail(module: nn.Module, inputs: tuple[object, ...]) -> None:
    raise RuntimeError("stopped")


@pytest.mark.parametrize("build", [Stateful, lambda: tiny("parallel", "layer", dropout=0.5)], ids=["batch", "layer"])
def test_network_is_left_as_it_was(build: Callable[[], nn.Module]) -> None:
    network = build().double()
    state, random = copy.deepcopy(network.state_dict()), torch.random.get_rng_state()
    modes = [module.training for module in network.modules()]
    with torch.no_grad():  # where callers may be
        values = measured(network)
    hook = network.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stopped"):
        surface(network, *rows())
    hook.remove()
    assert [module.training for module in network.modules()] == modes
    assert network.training
    after = network.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert all(weight.grad is None and weight.requires_grad for weight in network.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert measured(network.eval()) == values  # no dropout, and statistics that ran


# The picture.


def test_picture() -> None:
    axis_K = np.linspace(-1, 1, 5)
    bowl_KK = axis_K[:, None] ** 2 + axis_K**2
    broken_KK = bowl_KK.copy()
    broken_KK[0, 0] = math.nan
    losses = {"layer & none": bowl_KK, "rms <2>": 1e-3 * bowl_KK + 5, "partly": broken_KK}
    losses |= {"diverged": np.full((5, 5), math.nan), "flat": np.ones((5, 5))}
    picture = landscape_picture({name: Surface(axis_K, loss_KK) for name, loss_KK in losses.items()})
    texts = [text for text in ElementTree.fromstring(picture).itertext() if text.strip()]
    assert set(losses) <= set(texts)
    assert {"First direction, in norms of the weights", "Second direction"} <= set(texts)
    assert picture.startswith("<svg")


@pytest.mark.parametrize("loss_KK", [np.full((3, 3), math.nan), np.ones((3, 3)), np.eye(3)])
def test_picture_of_one(loss_KK: np.ndarray) -> None:
    assert ">layer</text>" in landscape_picture({"layer": Surface(np.linspace(-1, 1, 3), loss_KK)})
