"""Norms that are frozen in training and folded away, and norms that are affines anyway: what is left does the same.

Networks are compared in fp64 before and after, with parameters and running statistics at random and scales γ that are
zero in one channel and negative in another. Legend: B rows, F fields, d embedding width, h block width.
"""

import math
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import nn

from masknet.config import MaskNetConfig
from masknet.networks import PartialNorm, build_network
from masknet.norms import make_norm, set_progress, settled_from
from masknet.norms.affine import AffineOnly
from masknet.norms.base import Norm
from masknet.norms.none import NoNorm
from masknet.removal import FreezingNorm, begin_removal, finish_removal

F, D_FIELD, H, K = 3, 4, 6, 3
EPS = 1e-5
SHAPES = [(F, D_FIELD), (H,)]
# fp64 rounds by 1e-16; a fold sums the same products in another order, a dozen in each of five layers
EXACT = 1e-12

M = TypeVar("M", bound=nn.Module)


def has_norms(network: nn.Module) -> bool:
    """Whether anything but affines and nothing is left in the norms' places."""
    return any(isinstance(m, Norm) and not isinstance(m, AffineOnly | NoNorm | PartialNorm) for m in network.modules())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomized(module: M, silent: bool = False) -> M:
    """Everything at random, γ = 0 in the first channel and < 0 in the second; `silent`: the last never saw a value."""
    module = module.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(generator=generator)
            if name.endswith(".weight") and "norm" in name:
                parameter[..., 0], parameter[..., 1] = 0.0, -1.5
            elif name.endswith(".weight"):
                parameter.mul_(2 / math.sqrt(parameter.shape[1]))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator)
            elif name.endswith(("running_var", "running_power")):
                buffer.uniform_(0.5, 2.0, generator=generator)
                buffer[..., -1] = 0.0 if silent else 1.0
    return module


def configured(kind: str, **rest: object) -> MaskNetConfig:
    values = {"kind": kind, "blocks": K, "head": (5,) if kind == "parallel" else ()}
    return MaskNetConfig.model_validate({"embedding_dim": D_FIELD, "block_width": H, **values, **rest})


def network_of(config: MaskNetConfig, raw: tuple[int, ...] = (), *, silent: bool = False) -> nn.Module:
    network = randomized(build_network(config, F, raw), silent)
    set_progress(network, 1.0)
    return network.eval()


def norms_of(network: nn.Module) -> list[Norm]:
    return [module for module in network.modules() if isinstance(module, Norm)]


@torch.no_grad()
def logits(network: nn.Module, seed: int = 1) -> torch.Tensor:
    out: torch.Tensor = network(normal(50, F, D_FIELD, seed=seed))
    return out


def assert_same(network: nn.Module, expected: torch.Tensor) -> None:
    assert expected.std() > 0.1  # a network whose answer depends on its input
    size = float(expected.abs().max())
    torch.testing.assert_close(logits(network), expected, rtol=0, atol=EXACT * max(1.0, size))


# The freezing norm.


def deviations(name: str, x: np.ndarray) -> np.ndarray:
    """√(variance + eps), or √(mean square + eps), of each normalized vector, kept as an axis of 1."""
    centred = x - x.mean(-1, keepdims=True) if name == "layer" else x
    root: np.ndarray = np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
    return root


def divided(name: str, x: np.ndarray, divisor: np.ndarray, norm: FreezingNorm) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True) if name == "layer" else x
    out: np.ndarray = centred / divisor * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    return out


def freezing(name: str, shape: tuple[int, ...], freeze_at: float = 0.5) -> FreezingNorm:
    norm = make_norm(name, shape, eps=EPS)
    assert hasattr(norm, "weight")
    return randomized(FreezingNorm(norm, freeze_at))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["layer", "rms"])
class TestFreezingNorm:
    def test_it_is_the_norm_it_stands_for_until_it_is_frozen(self, name: str, shape: tuple[int, ...]) -> None:
        x, outer = normal(9, *shape), normal(9, *shape, seed=1)
        plain = randomized(make_norm(name, shape, eps=EPS))
        norm = FreezingNorm(plain, 0.5).double()  # type: ignore[arg-type]
        for training in (True, False):
            norm.train(training).set_progress(0.49)
            out = norm(x)
            torch.testing.assert_close(out, plain(x), rtol=0, atol=EXACT)
            expected = divided(name, x.numpy(), deviations(name, x.numpy()), norm)
            np.testing.assert_allclose(out.detach(), expected, rtol=0, atol=EXACT)
        leaf = x.clone().requires_grad_()
        gradients = [torch.autograd.grad(each(leaf), leaf, outer)[0] for each in (norm, plain)]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=EXACT)
        assert norm.weight is plain.weight  # trained weights are taken over, not copied

    def test_the_deviation_is_an_exponential_mean_over_steps(self, name: str, shape: tuple[int, ...]) -> None:
        norm = freezing(name, shape)
        running = None
        for step in range(6):
            x = normal(4 + step, *shape, seed=step) * (1 + step)
            norm.train()(x)
            norm.eval()(normal(5, *shape, seed=99))  # evaluation leaves no trace
            norm.train()(x[:0])  # nor does a rank without rows
            mean = deviations(name, x.numpy()).mean(0)
            running = mean if running is None else 0.9 * running + 0.1 * mean
            np.testing.assert_allclose(norm.running_deviation, running, rtol=EXACT)
        assert norm.running_deviation.shape == (*shape[:-1], 1)  # one for a hidden vector, one for each field

    def test_frozen_it_divides_by_the_constant(self, name: str, shape: tuple[int, ...]) -> None:
        norm, x = freezing(name, shape).train(), normal(9, *shape, seed=5)
        norm(x)
        norm.set_progress(0.5)
        frozen = norm.running_deviation.clone()
        for progress in (0.7, 0.1):  # for good, whatever is said later
            norm.set_progress(progress)
            for training in (True, False):
                y = 10 * normal(9, *shape, seed=6)
                out = norm.train(training)(y)
                expected = divided(name, y.numpy(), frozen.numpy(), norm)
                np.testing.assert_allclose(out.detach(), expected, rtol=EXACT, atol=EXACT)
        assert torch.equal(norm.running_deviation, frozen)

    def test_it_is_not_frozen_before_it_has_seen_a_step(self, name: str, shape: tuple[int, ...]) -> None:
        norm = freezing(name, shape)
        norm.train()(normal(0, *shape))
        norm.eval()(normal(3, *shape))
        norm.set_progress(1.0)
        with pytest.raises(ValueError, match="was not frozen"):
            norm.remaining()
        norm.train()(normal(3, *shape))
        with pytest.raises(ValueError, match="was not frozen"):
            norm.remaining()
        norm.set_progress(1.0)
        scale = norm.weight.detach() / norm.running_deviation
        assert torch.equal(norm.remaining().scale, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_deviation_is_kept_in_fp32(dtype: torch.dtype) -> None:
    norm = FreezingNorm(make_norm("layer", (H,), eps=EPS), 0.5).train()  # type: ignore[arg-type]
    x = normal(64, H).to(dtype)
    assert norm(x).dtype == dtype
    assert norm.running_deviation.dtype == torch.float32
    # a mean of 64 fp32 roots, rounded by 6e-8 each
    np.testing.assert_allclose(norm.running_deviation, deviations("layer", x.double().numpy()).mean(0), rtol=1e-6)


# The schedule.


@pytest.mark.parametrize("kind", ["serial", "parallel"])
@pytest.mark.parametrize("raw", [(), (1,)])
def test_blocks_are_frozen_in_their_order_and_then_the_embedding(kind: str, raw: tuple[int, ...]) -> None:
    config = configured(kind)
    network = build_network(config, F, raw)
    begin_removal(network, config)
    outer = network.embedding_norm
    embedding = outer.norm if isinstance(outer, PartialNorm) else outer
    assert isinstance(outer, PartialNorm) == bool(raw)
    assert embedding.shape == (F - len(raw), D_FIELD)
    ordered = [*(block.norm for block in network.blocks), embedding]
    # four norms from .1 to .6, evenly: .5 / 3 between them
    assert [norm.freeze_at for norm in ordered] == pytest.approx([0.1, 0.1 + 0.5 / 3, 0.1 + 1.0 / 3, 0.6])
    network.train()(normal(8, F, D_FIELD).float())
    for done, frozen in ((0.0, 0), (0.1, 1), (0.26, 1), (0.27, 2), (0.59, 3), (0.6, 4), (1.0, 4)):
        set_progress(network, done)
        assert [bool(norm.frozen) for norm in ordered] == [True] * frozen + [False] * (K + 1 - frozen)


@pytest.mark.parametrize(
    ("rest", "kept"),
    [
        ({"embedding_norm": "batch"}, [0.1, 0.35, 0.6]),
        ({"feed_forward": False, "hidden_norm": "none"}, [0.1]),
        ({"hidden_norm": "batch", "embedding_norm": "affine"}, []),
    ],
    ids=["blocks only", "embedding only", "nothing"],
)
def test_only_norms_of_a_row_are_frozen(rest: dict[str, object], kept: list[float]) -> None:
    config = configured("serial", **rest)
    network = build_network(config, F)
    begin_removal(network, config)
    assert [norm.freeze_at for norm in norms_of(network) if isinstance(norm, FreezingNorm)] == pytest.approx(kept)


def test_a_half_frozen_network_goes_through_its_state() -> None:
    config = configured("serial")
    networks = [build_network(config, F, (1,)).double() for _ in range(2)]
    for network in networks:
        begin_removal(network, config)
    randomized(networks[0]).double().train()(normal(8, F, D_FIELD))
    set_progress(networks[0], 0.3)
    networks[1].double().load_state_dict(networks[0].state_dict())
    assert torch.equal(logits(networks[1].eval()), logits(networks[0].eval()))
    flags = [[bool(norm.frozen) for norm in norms_of(n) if isinstance(norm, FreezingNorm)] for n in networks]
    assert flags[0] == flags[1]
    assert sum(flags[0]) == 2


@pytest.mark.parametrize(
    ("kind", "rest", "reason"),
    [
        ("serial", {"hidden_norm": "dyt"}, "hidden_norm dyt has no divisor"),
        ("parallel", {"embedding_norm": "conditional"}, "embedding_norm conditional has no divisor"),
        ("parallel", {"hidden_norm": "evonorm_s0"}, "hidden_norm evonorm_s0 has no divisor"),
        ("serial", {"hidden_norm": {"name": "power", "group_scaling": 2}}, "power with group_scaling"),
        ("residual_serial", {}, "a residual branch's have no W before them"),
    ],
    ids=lambda value: str(value),
)
def test_norms_that_cannot_be_removed(kind: str, rest: dict[str, object], reason: str) -> None:
    config = configured(kind, **rest)
    network = build_network(config, F)
    before = [type(module) for module in network.modules()]
    with pytest.raises(ValueError, match=reason):
        begin_removal(network, config)
    assert [type(module) for module in network.modules()] == before


@pytest.mark.parametrize(
    ("name", "done", "share"), [("layer", 0.0, 0.6), ("batch", 0.0, 0.1), ("prepbn", 0.5, 0.8), ("prepbn", 1.0, 0.1)]
)
def test_when_all_norms_are_affines(name: str, done: float, share: float) -> None:
    """The last norm is frozen at .6 of training and a lone one at .1; prepbn is done at .8, unless it was before."""
    config = configured("serial", hidden_norm=name)
    network = build_network(config, F)
    set_progress(network, done)
    begin_removal(network, config)
    assert settled_from(network) == share


# The end of removal.

LAYOUTS = [("serial", False, ()), ("serial", True, (1,)), ("parallel", True, ()), ("parallel", False, (0, 2))]
AFFINES = ["none", "affine", "batch", "power_v", "power", "unified", "prepbn"]  # what is, or becomes, an affine


def fine_tuned(config: MaskNetConfig, raw: tuple[int, ...]) -> nn.Module:
    """A network at the end of training with its norms frozen."""
    network = build_network(config, F, raw)
    begin_removal(network, config)
    network = randomized(network).train()
    for step in range(3):
        network(normal(20, F, D_FIELD, seed=step))
    set_progress(network, 1.0)
    return network.eval()


@pytest.mark.parametrize(("kind", "standardized", "raw"), LAYOUTS)
@pytest.mark.parametrize("hidden", ["layer", "rms", *AFFINES])
@pytest.mark.parametrize("embedding", ["layer", "rms", "batch", "affine"])
def test_what_is_left_equals_the_fine_tuned_network(
    kind: str, standardized: bool, raw: tuple[int, ...], hidden: str, embedding: str
) -> None:
    config = configured(kind, weight_standardization=standardized, hidden_norm=hidden, embedding_norm=embedding)
    network = fine_tuned(config, raw)
    expected = logits(network)
    assert has_norms(network) or {hidden, embedding} <= {"none", "affine"}
    left = finish_removal(network, config)
    assert (left.hidden_norm.name, left.embedding_norm.name) == ("affine", "affine")
    assert left.embedding_norm.parameters["centred"] == (embedding == "layer")
    assert not has_norms(network)
    assert not left.weight_standardization
    assert_same(network, expected)
    # the shape that was returned is that of the weights, and does the same
    rebuilt = build_network(left, F, raw).double().eval()
    rebuilt.load_state_dict(network.state_dict())
    assert_same(rebuilt, expected)


@pytest.mark.parametrize("raw", [(), (1,)])
def test_a_centred_affine_stays_as_it_is(raw: tuple[int, ...]) -> None:
    config = configured("serial", embedding_norm={"name": "affine", "centred": True})
    network = fine_tuned(config, raw)
    expected = logits(network)
    assert finish_removal(network, config).embedding_norm == config.embedding_norm
    assert_same(network, expected)


def test_blocks_that_only_mask_lose_the_embedding_norm() -> None:
    config = configured("serial", feed_forward=False, hidden_norm="none")
    network = fine_tuned(config, ())
    expected = logits(network)
    left = finish_removal(network, config)
    assert (left.hidden_norm.name, left.embedding_norm.name) == ("none", "affine")
    assert_same(network, expected)


@pytest.mark.parametrize(
    ("hidden", "done", "reason"), [("layer", 0.5, "was not frozen"), ("prepbn", 0.7, "PRepBatchNorm is no affine yet")]
)
def test_removal_that_has_not_come_to_its_end(hidden: str, done: float, reason: str) -> None:
    config = configured("parallel", hidden_norm=hidden)
    network = build_network(config, F)
    begin_removal(network, config)
    network.train()(normal(8, F, D_FIELD).float())
    set_progress(network, done)
    with pytest.raises(ValueError, match=reason):
        finish_removal(network, config)
