"""Networks beyond the paper's: residual placements, other activations and norms, and its ablations.

The reference is the definition, written out row by row in fp64.
Legend: B rows, F fields, d embedding width, D = F·d, K blocks, h block width, t aggregation width of a mask.
"""

import math
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load, save
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

from masknet.activations import initialize
from masknet.blocks import MaskBlock, NoMask, StandardizedLinear
from masknet.config import MaskNetConfig, NormConfig
from masknet.networks import PartialNorm, build_network
from masknet.norms import NORMS, make_norm, set_progress
from masknet.norms.base import Norm
from masknet.norms.none import NoNorm
from masknet.residual import ResidualBlock

F, D_FIELD, H = 3, 5, 7
KINDS = ("serial", "parallel", "residual_serial")
PLACEMENTS = ("pre", "post", "peri", "mix", "none")

State = dict[str, np.ndarray]
M = TypeVar("M", bound=nn.Module)


# The definition, of one row.


def activated(name: str, vector: np.ndarray) -> np.ndarray:
    if name == "relu":
        return np.array([max(value, 0.0) for value in vector])
    scale, alpha = (1.0507009873554805, 1.6732632423543772) if name == "selu" else (1.0, 1.0)
    return np.array([scale * (value if value > 0 else alpha * (math.exp(value) - 1)) for value in vector])


def affine(state: State, key: str, vector: np.ndarray, standardized: bool = False) -> np.ndarray:
    weight = state[f"{key}.weight"]
    if standardized:
        weight = np.array([(row - row.mean()) / (row.std(ddof=1) + 1e-5) for row in weight])
    return weight @ vector + state.get(f"{key}.bias", 0.0)


def normalized(slot: NormConfig, state: State, key: str, vector: np.ndarray, field: int | None = None) -> np.ndarray:
    if slot.name == "none":
        return vector
    centred = vector - vector.mean() if slot.name == "layer" else vector
    own = [state[f"{key}.weight"], state.get(f"{key}.bias", np.zeros_like(state[f"{key}.weight"]))]
    weight, bias = own if field is None else (each[field] for each in own)
    return weight * centred / math.sqrt((centred**2).mean() + slot.eps) + bias


def masked(config: MaskNetConfig, state: State, key: str, vector: np.ndarray, raw: np.ndarray) -> np.ndarray:
    if not config.mask:
        return vector
    inner = activated("relu", affine(state, f"{key}.mask.aggregate", raw))  # a ReLU, whatever the blocks have
    return affine(state, f"{key}.mask.project", inner) * vector


def block(config: MaskNetConfig, state: State, key: str, vector: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """activation(LN_HID(W (m ⊙ x))), or m ⊙ x."""
    inner = masked(config, state, key, vector, raw)
    if not config.feed_forward:
        return inner
    hidden = affine(state, f"{key}.linear", inner, config.weight_standardization)
    return activated(config.activation, normalized(config.hidden_norm, state, f"{key}.norm", hidden))


def residual(config: MaskNetConfig, state: State, k: int, R: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """What block k, counted from 1, makes of the residual stream R."""
    key, branches, place = f"blocks.{k - 1}", config.blocks - 1, config.placement
    if place == "mix":
        place = "post" if k - 2 < max(1, branches // 4) else "pre"
    c = 1 / math.sqrt(k) if config.depth_scaling == "layernorm_scaling" else 1.0
    s = 1 / math.sqrt(branches) if config.depth_scaling == "residual" else 1.0

    def f(x: np.ndarray) -> np.ndarray:
        inner = affine(state, f"{key}.linear", masked(config, state, key, x, raw), config.weight_standardization)
        return activated(config.activation, inner)

    def norm(which: str, x: np.ndarray) -> np.ndarray:
        return normalized(config.hidden_norm, state, f"{key}.norm_{which}", x)

    if place == "pre":
        return R + s * f(c * norm("in", R))
    if place == "post":
        return norm("after", R + s * f(R))
    if place == "peri":
        return R + s * norm("out", f(norm("in", R)))
    return R + s * f(R)


def logit(config: MaskNetConfig, state: State, fields: np.ndarray) -> float:
    """The network's answer to one row's embeddings [F, d]."""
    raw = fields.reshape(-1)
    rows = [normalized(config.embedding_norm, state, "embedding_norm", row, f) for f, row in enumerate(fields)]
    x = np.concatenate(rows)
    if config.kind == "parallel":
        x = np.concatenate([block(config, state, f"blocks.{k}", x, raw) for k in range(config.blocks)])
        for i in range(len(config.head)):
            x = activated(config.activation, affine(state, f"head.{3 * i}", x))
    else:
        x = block(config, state, "blocks.0", x, raw)
        for k in range(2, config.blocks + 1):
            if config.kind == "serial":
                x = block(config, state, f"blocks.{k - 1}", x, raw)
            else:
                x = residual(config, state, k, x, raw)
        if config.placement in ("pre", "peri", "mix"):
            x = normalized(config.hidden_norm, state, "final_norm", x)
    return float(affine(state, "logit", x)[0])


def state_of(module: nn.Module) -> State:
    return {key: value.double().numpy() for key, value in module.state_dict().items()}


# What the tests are run on.


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomized(module: M, dtype: torch.dtype = torch.float64) -> M:
    """Every parameter at random, γ and β too; products scaled by their width, lest activations grow or die."""
    module = module.to(dtype)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.normal_(generator=generator)
            if key.endswith(".weight") and "norm" not in key:
                parameter.mul_(2 / math.sqrt(parameter.shape[1]))
    return module


def configured(kind: str = "parallel", blocks: int = 3, **rest: object) -> MaskNetConfig:
    values = {"kind": kind, "blocks": blocks, "head": (4,) if kind == "parallel" else ()}
    return MaskNetConfig.model_validate({"embedding_dim": D_FIELD, "block_width": H, **values, **rest})


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # fp64: up to ten layers of sums of at most 30 products of numbers below 100, and norms between that may make the
    # roundings of 1e-15 some ten times larger
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-11, atol=1e-11)


def agrees(config: MaskNetConfig) -> None:
    """The network that `config` describes is the definition's."""
    network, emb = randomized(build_network(config, F)), normal(6, F, D_FIELD) + 0.3
    state = state_of(network)
    expected = [logit(config, state, row) for row in emb.numpy()]
    out = network(emb)
    assert float(out.detach().std()) > 0.01  # else a constant would pass
    close(out, torch.tensor(expected, dtype=torch.float64))


# Residuals.

RESIDUALS = [
    (placement, scaling, 4)
    for placement in PLACEMENTS
    for scaling in ("none", "layernorm_scaling", "residual")
    if scaling != "layernorm_scaling" or placement in ("pre", "mix")
]


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("activation", ["relu", "selu"])
@pytest.mark.parametrize(
    ("placement", "scaling", "blocks"),
    [*RESIDUALS, ("pre", "none", 2), ("mix", "none", 3), ("mix", "layernorm_scaling", 9), ("mix", "residual", 10)],
)
def test_residuals(placement: str, scaling: str, blocks: int, norm: str, activation: str) -> None:
    hidden = "none" if placement == "none" else {"name": norm, "eps": 1e-3}
    rest = {"placement": placement, "depth_scaling": scaling, "activation": activation}
    agrees(configured("residual_serial", blocks, hidden_norm=hidden, embedding_norm=norm, **rest))


def test_residuals_are_pre_unless_said() -> None:
    config = configured("residual_serial")
    assert config.placement == "pre"
    assert config == configured("residual_serial", placement="pre")


@pytest.mark.parametrize(("blocks", "post"), [(3, 1), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3), (17, 4)])
def test_mix_has_the_first_quarter_post(blocks: int, post: int) -> None:
    network = build_network(configured("residual_serial", blocks, placement="mix"), F)
    has_after = [not isinstance(each.norm_after, NoNorm) for each in network.blocks[1:]]
    has_in = [not isinstance(each.norm_in, NoNorm) for each in network.blocks[1:]]
    assert has_after == [True] * post + [False] * (blocks - 1 - post)
    assert has_in == [not each for each in has_after]


def test_residual_rows_do_not_see_each_other() -> None:
    network, emb = randomized(build_network(configured("residual_serial", placement="peri"), F)), normal(6, F, D_FIELD)
    close(network(emb[2:3]), network(emb)[2:3])
    assert network(emb[:0]).shape == (0,)


# What a configuration refuses, and what cures it.

RESIDUAL = {"kind": "residual_serial", "head": []}
NO_FEED_FORWARD = {"feed_forward": False, "hidden_norm": "none"}


@pytest.mark.parametrize(
    ("values", "parts", "cure"),
    [
        ({"kind": "serial"}, ["head must be []", "kind serial", "prediction layer"], {"head": []}),
        ({"kind": "residual_serial"}, ["head must be []", "kind residual_serial"], {"head": []}),
        ({**NO_FEED_FORWARD, "mask": False}, ["mask: false", "feed_forward: false", "nothing to do"], {"mask": True}),
        (
            {"feed_forward": False},
            ["feed_forward: false", "hidden_norm", "nothing to normalize"],
            {"hidden_norm": "none"},
        ),
        (
            {**NO_FEED_FORWARD, "weight_standardization": True},
            ["weight_standardization", "W", "feed_forward: false"],
            {"weight_standardization": False},
        ),
        (
            {"hidden_norm": {"name": "affine", "centred": True}},
            ["hidden_norm affine", "centring", "linear layer before it"],
            {"hidden_norm": "affine"},
        ),
        ({"placement": "pre"}, ["placement pre", "kind residual_serial", "without a residual"], {"placement": None}),
        (
            {"kind": "serial", "head": [], "placement": "none"},
            ["placement none", "kind residual_serial"],
            {"kind": "residual_serial", "hidden_norm": "none"},
        ),
        (
            {"depth_scaling": "layernorm_scaling"},
            ["depth_scaling layernorm_scaling", "does nothing without a residual"],
            {"depth_scaling": "none"},
        ),
        (
            {"kind": "serial", "head": [], "depth_scaling": "residual"},
            ["depth_scaling residual", "only residual_serial"],
            {"kind": "residual_serial"},
        ),
        ({**RESIDUAL, "blocks": 1}, ["residual_serial", "2 blocks at least"], {"blocks": 2}),
        (
            {**RESIDUAL, **NO_FEED_FORWARD, "placement": "none"},
            ["residual_serial", "feed_forward must be true"],
            {"feed_forward": True},
        ),
        ({**RESIDUAL, "hidden_norm": "evonorm_s0"}, ["hidden_norm evonorm_s0", "activation"], {"hidden_norm": "l1"}),
        (
            {**RESIDUAL, "placement": "none"},
            ["placement none", "hidden_norm layer unused"],
            {"hidden_norm": "none"},
        ),
        (
            {**RESIDUAL, "placement": "post", "hidden_norm": "none"},
            ["placement post of hidden_norm none", "placement none"],
            {"placement": "none"},
        ),
        (
            {**RESIDUAL, "hidden_norm": "none"},
            ["placement pre of hidden_norm none", "placement none"],
            {"placement": "none"},
        ),
        ({**RESIDUAL, "blocks": 2, "placement": "mix"}, ["placement mix", "3 blocks", "nothing to mix"], {"blocks": 3}),
        *(
            (
                {**RESIDUAL, "placement": place, "depth_scaling": "layernorm_scaling", "hidden_norm": norm},
                ["depth_scaling layernorm_scaling", "pre or mix", f"placement {place}"],
                {"placement": "mix", "hidden_norm": "layer"},
            )
            for place, norm in [("post", "layer"), ("peri", "layer"), ("none", "none")]
        ),
        (
            {**RESIDUAL, "blocks": 2, "depth_scaling": "residual"},
            ["depth_scaling residual", "n is 1, and nothing changes"],
            {"blocks": 3},
        ),
    ],
    ids=str,
)
def test_refused_switches(values: dict[str, Any], parts: list[str], cure: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        MaskNetConfig.model_validate(values)
    [error] = caught.value.errors()
    assert all(part in error["msg"] for part in parts), error["msg"]
    MaskNetConfig.model_validate({**values, **cure})


@pytest.mark.parametrize("slot", ["embedding_norm", "hidden_norm"])
@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("crms", ["crms (arXiv 2305.14858)", "with a ReLU between", "wrong"]),
        ({"name": "crms"}, ["crms (arXiv 2305.14858)"]),
        ("batchnorm", ["'batchnorm' is no normalization", *NORMS]),
        ({"name": ["layer"]}, ["valid string"]),
        ({"name": "dyt", "alhpa": 1}, ["alhpa: unknown key; dyt has eps, alpha"]),
        ({"name": "conditional", "instance_width": 3}, ["instance_width: unknown key; conditional has eps, rank"]),
        ({"name": "batch", "momentum": 1.0}, ["momentum: ", "less than 1"]),
        ({"name": "seednorm", "heads": 0}, ["heads: ", "greater than or equal to 1"]),
        ({"name": "seednorm", "heads": 1.5}, ["heads: ", "integer"]),
        ({"name": "bhyt", "kappa": math.inf}, ["kappa: ", "finite"]),
        ({"name": "l1", "gain": -1}, ["gain: ", "greater than 0"]),
        ({"name": "bhyt", "kappa": 0, "bound": "wide"}, ["kappa: ", "; bound: "]),
    ],
    ids=str,
)
def test_refused_norms(slot: str, value: object, parts: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        MaskNetConfig.model_validate({slot: value})
    [error] = caught.value.errors()
    assert error["loc"][0] == slot
    assert all(part in error["msg"] for part in parts), error["msg"]


def test_groups_that_do_not_divide_a_width_are_told_when_the_network_is_built() -> None:
    config = configured(hidden_norm={"name": "seednorm", "heads": 2})
    with pytest.raises(ValueError, match="heads 2 does not divide a width of 7"):
        build_network(config, F)


@pytest.mark.parametrize("c", [0.5, 3.0])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_constant_factor_does_nothing_without_a_residual(norm: str, c: float) -> None:
    config = configured("serial", hidden_norm={"name": norm, "eps": 1e-30})
    one, x, raw = randomized(build_network(config, F)).blocks[1], normal(6, H, seed=1), normal(6, F * D_FIELD)
    close(one(c * x, raw), one(x, raw))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_second_norm_of_peri_undoes_a_factor_before_a_relu(norm: str) -> None:
    config = configured("residual_serial", placement="peri", hidden_norm={"name": norm, "eps": 1e-30})
    one, x, raw = randomized(build_network(config, F)).blocks[1], normal(6, H, seed=1), normal(6, F * D_FIELD)
    expected = one(x, raw)
    one.input_scale = 0.5
    close(one(x, raw), expected)


def test_centring_of_a_linear_layers_output_is_a_linear_layer() -> None:
    blocks = []
    for centred in (True, False):
        norm = make_norm("affine", (H,), eps=1e-5, centred=centred)
        blocks.append(randomized(MaskBlock(NoMask(), 4, H, norm, 0.0)))
    with torch.no_grad():
        blocks[1].linear.weight -= blocks[1].linear.weight.mean(0)
    x, raw = normal(6, 4, seed=1), normal(6, F * D_FIELD)
    close(blocks[0](x, raw), blocks[1](x, raw))


# Activations.


@pytest.mark.parametrize("activation", ["relu", "elu", "selu"])
@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("kind", ["serial", "parallel"])
def test_activations(kind: str, norm: str, activation: str) -> None:
    agrees(configured(kind, activation=activation, hidden_norm=norm))


@pytest.mark.parametrize("activation", ["relu", "elu", "selu"])
@pytest.mark.parametrize("kind", KINDS)
def test_initialization(kind: str, activation: str) -> None:
    sizes = {"embedding_dim": 40, "block_width": 100, "head": (90, 80) if kind == "parallel" else ()}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = build_network(configured(kind, activation=activation, **sizes), F)
    before_selu = [key for key, _ in network.named_modules() if key.endswith(".linear") or key in ("head.0", "head.3")]
    assert len(before_selu) == (5 if kind == "parallel" else 3)
    for key, module in network.named_modules():
        if isinstance(module, nn.Linear) and key != "logit":  # whose 100 weights tell less
            lecun = activation == "selu" and key in before_selu
            # torch's own is uniform up to 1/√fan-in, a third of LeCun's variance
            expected = 1 / math.sqrt(module.in_features * (1 if lecun else 3))
            # the standard deviation of 7,200 or more values is known to 0.8 %
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=0.04), key
            assert (float(module.weight.detach().abs().max()) > 1 / math.sqrt(module.in_features)) == lecun, key


def test_lecuns_initialization_leaves_the_bias() -> None:
    linear = nn.Linear(5, 4)
    bias, weight = linear.bias.detach().clone(), linear.weight.detach().clone()
    with torch.random.fork_rng():
        assert initialize(linear, "selu") is linear
    assert torch.equal(linear.bias, bias)
    assert not torch.equal(linear.weight, weight)


@pytest.mark.parametrize(
    ("activation", "dropout"), [("relu", nn.Dropout), ("elu", nn.Dropout), ("selu", nn.AlphaDropout)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_dropout(kind: str, activation: str, dropout: type[nn.Module]) -> None:
    network = build_network(configured(kind, activation=activation, dropout=0.3), F)
    drops = [module for module in network.modules() if isinstance(module, nn.Dropout | nn.AlphaDropout)]
    assert [(type(drop), drop.p) for drop in drops] == [(dropout, 0.3)] * (4 if kind == "parallel" else 3)
    emb = normal(50, F, D_FIELD).float()
    with torch.random.fork_rng():
        assert not torch.equal(network(emb), network(emb))
    network.eval()
    assert torch.equal(network(emb), network(emb))


# Weight standardization.


def test_standardized_rows() -> None:
    linear, x = StandardizedLinear(6, 4).double(), normal(3, 6, seed=1)
    with torch.no_grad():
        linear.weight.copy_(3 * normal(4, 6) + 2)
    weight, standardized = linear.weight.detach().numpy(), linear.standardized().detach().numpy()
    deviation = np.array([math.sqrt(sum((w - sum(row) / 6) ** 2 for w in row) / 5) for row in weight])
    # fp64 roundings in numbers below 10
    np.testing.assert_allclose(standardized.mean(1), 0, atol=1e-14)
    np.testing.assert_allclose(standardized.std(1, ddof=1), deviation / (deviation + 1e-5), rtol=1e-13)
    expected = affine({"w.weight": weight, "w.bias": linear.bias.detach().numpy()}, "w", x.numpy().T[:, 0], True)
    close(linear(x)[0], torch.from_numpy(expected))


def test_standardized_gradients() -> None:
    linear, x = StandardizedLinear(6, 4, bias=False).double(), normal(3, 6, seed=1).requires_grad_()

    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional_call(linear, {"weight": weight}, (x,))

    assert gradcheck(call, (x, normal(4, 6).requires_grad_()))


@pytest.mark.parametrize("width", [1, 6])
def test_standardized_rows_without_deviation_are_zero(width: int) -> None:
    linear, x = StandardizedLinear(width, 4, bias=False), normal(3, width).float()
    nn.init.constant_(linear.weight, 0.5)
    out = linear(x)
    assert torch.equal(out, torch.zeros(3, 4))
    out.sum().backward()
    assert bool(linear.weight.grad.isfinite().all())


@pytest.mark.parametrize("activation", ["relu", "selu"])
@pytest.mark.parametrize("kind", KINDS)
def test_weight_standardization(kind: str, activation: str) -> None:
    config = configured(kind, weight_standardization=True, activation=activation)
    agrees(config)
    standardized = [key for key, each in build_network(config, F).named_modules() if type(each) is StandardizedLinear]
    assert standardized == [f"blocks.{k}.linear" for k in range(3)]  # of masks, head and logit none


# The paper's ablations, and sizes.


@pytest.mark.parametrize("kind", KINDS)
def test_without_masks(kind: str) -> None:
    agrees(configured(kind, mask=False))
    with_masks = randomized(build_network(configured(kind), F))
    with torch.no_grad():
        for each in with_masks.blocks:
            each.mask.project.weight.zero_()
            each.mask.project.bias.fill_(1.0)
    without = build_network(configured(kind, mask=False), F).double()
    without.load_state_dict({key: value for key, value in with_masks.state_dict().items() if ".mask." not in key})
    emb = normal(6, F, D_FIELD)
    assert torch.equal(without(emb), with_masks(emb))


@pytest.mark.parametrize("kind", ["serial", "parallel"])
def test_without_feed_forward(kind: str) -> None:
    agrees(configured(kind, feed_forward=False, hidden_norm="none"))


def test_serial_without_feed_forward_is_a_product() -> None:
    config = configured("serial", feed_forward=False, hidden_norm="none", embedding_norm="none")
    network, emb = randomized(build_network(config, F)), normal(6, F, D_FIELD)
    raw = emb.flatten(1)
    masks = [each.mask(raw) for each in network.blocks]
    close(network(emb), network.logit(raw * masks[0] * masks[1] * masks[2]).squeeze(-1))


def mask_size(big: int, width: int, ratio: float = 2.0) -> int:
    t = int(ratio * width)
    return big * t + t + t * width + width


BIG = F * D_FIELD
FIRST = BIG * H + 2 * H  # W and LN_HID of a block on the embedding
EMBEDDING, HEAD = 2 * BIG, 3 * H * 4 + 4 + 4 + 1


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (configured("parallel", mask=False), EMBEDDING + 3 * FIRST + HEAD),
        (configured("serial", mask=False), EMBEDDING + FIRST + 2 * (H * H + 2 * H) + H + 1),
        (
            configured("parallel", feed_forward=False, hidden_norm="none"),
            EMBEDDING + 3 * mask_size(BIG, BIG) + 3 * BIG * 4 + 4 + 4 + 1,
        ),
        (
            configured("serial", feed_forward=False, hidden_norm="none"),
            EMBEDDING + 3 * mask_size(BIG, BIG) + BIG + 1,
        ),
        (
            configured("parallel", weight_standardization=True, activation="selu"),
            EMBEDDING + 3 * (mask_size(BIG, BIG) + FIRST) + HEAD,
        ),
        *(
            (
                configured("residual_serial", placement=place, reduction_ratio=0.5),
                EMBEDDING
                + mask_size(BIG, BIG, 0.5)
                + FIRST
                + 2 * (mask_size(BIG, H, 0.5) + H * H)
                + norms * 2 * H
                + H
                + 1,
            )
            for place, norms in [("pre", 3), ("post", 2), ("peri", 5), ("mix", 3)]
        ),
        (
            configured("residual_serial", placement="none", hidden_norm="none", mask=False),
            EMBEDDING + BIG * H + 2 * H * H + H + 1,
        ),
    ],
)
def test_parameter_counts(config: MaskNetConfig, expected: int) -> None:
    assert sum(parameter.numel() for parameter in build_network(config, F).parameters()) == expected


# Every normalization in a network.

# parameters of every norm that are not the defaults, and where its module has them
OTHER: dict[str, dict[str, Any]] = {
    "layer": {},
    "rms": {},
    "none": {},
    "batch": {"momentum": 0.2},
    "power_v": {"alpha": 0.8},
    "power": {"alpha": 0.8, "alpha_backward": 0.7, "warmup_steps": 1, "group_scaling": 1},
    "unified": {"window": 3, "alpha": 0.8, "warmup_steps": 2, "outlier_filtering": True},
    "prepbn": {"momentum": 0.2, "warm": 0.1, "until": 0.7},
    "dyt": {"alpha": 1.5},
    "bhyt": {"kappa": 5.0, "bound": 1.5, "gain": 1.25},
    "seednorm": {"heads": 7},
    "l1": {"gain": 0.75},
    "evonorm_s0": {"groups": 7},
    "variance_only": {},
    "conditional": {"rank": 3},
    "affine": {"centred": True},
}
PLACE = {
    ("prepbn", "momentum"): "batch.momentum",
    ("bhyt", "gain"): "weight",
    ("l1", "gain"): "weight",
    ("conditional", "rank"): "aggregate.out_features",
}


def test_the_table_knows_every_parameter() -> None:
    assert OTHER.keys() == NORMS.keys()
    for name, own in OTHER.items():
        defaults = NormConfig(name=name).parameters
        assert defaults["eps"] == NORMS[name].default_eps
        assert {*own, "eps"} == defaults.keys()
        assert all(value != defaults[key] for key, value in own.items())


@pytest.mark.parametrize("name", NORMS)
def test_parameters_go_through_the_configuration_into_the_norm(name: str) -> None:
    value = {"name": name, "eps": 0.125, **OTHER[name]}
    config = configured(embedding_norm=value)
    assert config.embedding_norm.parameters == {"eps": 0.125, **OTHER[name]}
    assert MaskNetConfig.model_validate(config.model_dump(mode="json")) == config
    assert MaskNetConfig.model_validate_json(config.model_dump_json()) == config
    norm = make_norm(name, (F, 7), instance_width=5, **config.embedding_norm.parameters)
    assert norm.eps == 0.125
    for key, expected in OTHER[name].items():
        found: Any = norm
        for part in PLACE.get((name, key), key).split("."):
            found = getattr(found, part)
        assert bool((found == expected).all()) if isinstance(found, torch.Tensor) else found == expected, key


def with_norm(name: str, kind: str = "parallel", **rest: object) -> MaskNetConfig:
    placement = {"placement": "none" if name == "none" else "peri"} if kind == "residual_serial" else {}
    return configured(kind, embedding_norm=name, hidden_norm=name, **placement, **rest)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in NORMS for kind in KINDS if (name, kind) != ("evonorm_s0", "residual_serial")],
)
@pytest.mark.parametrize("raw", [(), (1,)], ids=["all fields", "a raw field"])
def test_every_norm_trains_and_is_stored(name: str, kind: str, raw: tuple[int, ...]) -> None:
    config = with_norm(name, kind, dropout=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network, other = build_network(config, F, raw), build_network(config, F, raw)
        for step in range(3):
            set_progress(network, 0.5)  # where prepbn blends both its norms
            network.zero_grad()
            network(normal(32, F, D_FIELD, seed=step).float()).square().sum().backward()
            for key, parameter in network.named_parameters():
                assert parameter.grad is not None, key
                assert bool(parameter.grad.isfinite().all()), key
    still = {key for key, parameter in network.named_parameters() if not bool(parameter.grad.any())}
    # what is multiplied by something that starts at 0
    waits = {"seednorm": ".alpha", "conditional": ".aggregate."}.get(name)
    assert still == {key for key, _ in network.named_parameters() if waits and "norm" in key and waits in key}
    emb = normal(9, F, D_FIELD, seed=8).float()
    expected = network.eval()(emb)
    assert bool(expected.isfinite().all())
    assert not torch.equal(other.eval()(emb), expected)
    other.load_state_dict(load(save(network.state_dict())))
    assert torch.equal(other(emb), expected)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("raw", [(1,), (0, 2)], ids=str)
def test_raw_fields_pass_the_norm(name: str, raw: tuple[int, ...]) -> None:
    norm = randomized(build_network(with_norm(name), F, raw)).eval().embedding_norm
    assert isinstance(norm, PartialNorm)
    assert "fields" not in norm.state_dict()
    emb, instance = normal(6, F, D_FIELD).requires_grad_(), normal(6, F * D_FIELD, seed=1)
    rest = [field for field in range(F) if field not in raw]
    out = norm(emb, instance=instance)
    assert torch.equal(out[:, raw], emb[:, raw])
    assert torch.equal(out[:, rest], norm.norm(emb[:, rest], instance=instance))
    assert torch.equal(out[:, rest], emb[:, rest]) == (name == "none")
    upstream = normal(6, F, D_FIELD, seed=2)
    out.backward(upstream)
    assert torch.equal(emb.grad[:, raw], upstream[:, raw])


def test_all_fields_raw_leave_no_norm() -> None:
    norm, emb = build_network(with_norm("batch"), F, (0, 1, 2)).embedding_norm, normal(6, F, D_FIELD)
    assert torch.equal(norm(emb), emb)
    assert not list(norm.parameters())


def test_progress_reaches_every_norm() -> None:
    network = build_network(with_norm("prepbn"), F, (0,))
    blends = [value for key, value in network.named_buffers() if key.endswith("blend")]
    assert len(blends) == 4
    assert [float(blend) for blend in blends] == [1.0] * 4
    assert network.embedding_norm.fold() is None
    set_progress(network, 1.0)
    assert [float(blend) for blend in blends] == [0.0] * 4
    assert network.embedding_norm.fold() is not None


@pytest.mark.parametrize("name", ["batch", "affine", "prepbn"])
def test_partial_norm_folds(name: str) -> None:
    norm: Norm = randomized(build_network(with_norm(name), F, (1,))).embedding_norm
    for step in range(3):
        norm(3 * normal(20, F, D_FIELD, seed=step) + 1)
    norm.norm.set_progress(1.0)
    norm.eval()
    folded, emb = norm.fold(), normal(6, F, D_FIELD, seed=8)
    assert folded is not None
    assert torch.equal(folded.scale[1], torch.ones(D_FIELD, dtype=torch.float64))
    assert torch.equal(folded.shift[1], torch.zeros(D_FIELD, dtype=torch.float64))
    close(folded.scale * emb + folded.shift, norm(emb))


@pytest.mark.parametrize("slot", ["layer", "l1", {"name": "affine", "centred": True}], ids=str)
def test_partial_norm_of_what_does_not_fold(slot: object) -> None:
    assert build_network(configured(embedding_norm=slot), F, (1,)).embedding_norm.fold() is None


def test_residual_block_shows_its_scales() -> None:
    network = build_network(configured("residual_serial", depth_scaling="layernorm_scaling"), F)
    shown = [each.extra_repr() for each in network.blocks if isinstance(each, ResidualBlock)]
    assert shown == ["input_scale=0.7071, branch_scale=1", "input_scale=0.5774, branch_scale=1"]
