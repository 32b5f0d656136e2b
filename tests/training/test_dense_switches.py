"""SCALE and normalize-and-project: each step against its definition, and both inside training."""

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import nn

from features.dataset import PreparedDataset
from features.prepare import prepare
from features.schema import Schema
from features.splits import SplitRule
from masknet.config import MaskNetConfig
from masknet.model import MaskNet, Table
from masknet.networks import build_network
from masknet.norms import NORMS
from masknet.values import ValueField
from serving.bundle import load_bundle
from training.config import Config, load_config
from training.fit.starting import build_model
from training.optim.projection import Projection
from training.optim.scale import Scale
from training.train import train

QUIET = Console(quiet=True)
F, D_FIELD, H = 3, 4, 6
LR, DECAY = 0.01, 0.1
EXACT = 1e-12  # fp64 rounds by 1e-16; ten steps of sums over a dozen terms

State = dict[str, np.ndarray]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def configured(kind: str, **rest: object) -> MaskNetConfig:
    values = {"kind": kind, "blocks": 2, "head": (5,) if kind == "parallel" else ()}
    return MaskNetConfig.model_validate({"embedding_dim": D_FIELD, "block_width": H, **values, **rest})


def a_model(kind: str = "parallel", **rest: object) -> MaskNet:
    torch.manual_seed(0)
    table = Table(name="a", features=("a", "b"), rows=5, pooling="sum")
    return MaskNet(configured(kind, **rest), (table,), ("a", "b", ValueField(name="x"))).double()


def dense_parameters(model: MaskNet) -> dict[str, nn.Parameter]:
    """What the dense optimizer gets: all but the tables."""
    return {name: p for name, p in model.named_parameters() if not name.startswith("embeddings.")}


def scale_of(model: MaskNet, **rest: float) -> Scale:
    settings = {"lr": LR, "weight_decay": DECAY, **rest}
    return Scale(model.network, list(dense_parameters(model).values()), **settings)


def gradients(model: MaskNet, step: int) -> State:
    """Those of some loss of the embeddings of 8 rows, of which one is made of values."""
    model.zero_grad()
    assert model.values is not None
    made = model.values(normal(8, 1, seed=step), torch.zeros(8, 1, dtype=torch.float64)).values()
    emb_BFd = torch.cat([normal(8, F - 1, D_FIELD, seed=step), made.unsqueeze(1)], dim=1)
    model.network(emb_BFd).square().sum().backward()
    parameters = dense_parameters(model)
    # a value that is always there has no gradient of its being missing
    return {name: p.grad.numpy().copy() for name, p in parameters.items() if p.grad is not None}


# SCALE.


def is_matrix(name: str) -> bool:
    layers = ("linear.weight", "aggregate.weight", "project.weight", "logit.weight")
    return name.endswith(layers) or (name.startswith("network.head.") and name.endswith("weight"))


class Reference:
    """The docstring, parameter by parameter in numpy."""

    def __init__(self) -> None:
        self.mean: State = {}
        self.square: State = {}

    def step(self, t: int, name: str, weight: np.ndarray, g: np.ndarray) -> np.ndarray:
        if is_matrix(name):
            if name == "network.logit.weight":
                g = self.mean[name] = 0.9 * self.mean.get(name, 0.0) + 0.1 * g
            u = np.array([row / max(np.sqrt(np.mean(row**2)), 1e-8) for row in g])
        else:
            m = self.mean[name] = 0.9 * self.mean.get(name, 0.0) + 0.1 * g
            v = self.square[name] = 0.999 * self.square.get(name, 0.0) + 0.001 * g**2
            u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        return (1 - LR * DECAY) * weight - LR * u


@pytest.mark.parametrize(
    ("kind", "rest"),
    [("parallel", {}), ("serial", {"weight_standardization": True}), ("residual_serial", {"hidden_norm": "rms"})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ten_steps_of_scale(kind: str, rest: dict[str, object]) -> None:
    model = a_model(kind, **rest)
    optimizer, reference = scale_of(model), Reference()
    expected = {name: p.detach().numpy().copy() for name, p in dense_parameters(model).items()}
    for t in range(1, 11):
        found = gradients(model, t)
        assert len(found) >= len(expected) - 1
        optimizer.step()
        for name, g in found.items():
            expected[name] = reference.step(t, name, expected[name], g)
    for name, p in dense_parameters(model).items():
        np.testing.assert_allclose(p.detach(), expected[name], rtol=0, atol=EXACT, err_msg=name)


def test_which_parameters_are_treated_how() -> None:
    """Linear layers' weights by rows; affines of fields and embeddings of values not, though they have 2 axes."""
    model = a_model("parallel", hidden_norm={"name": "conditional", "rank": 2}, embedding_norm="seednorm")
    names = {id(p): name for name, p in dense_parameters(model).items()}
    kinds = {g["kind"]: {names[id(p)] for p in g["params"]} for g in scale_of(model).param_groups}
    blocks = [f"network.blocks.{k}" for k in range(2)]
    layers = ["mask.aggregate", "mask.project", "linear", "norm.aggregate", "norm.project"]
    assert kinds["last"] == {"network.logit.weight"}
    assert kinds["matrix"] == {f"{b}.{layer}.weight" for b in blocks for layer in layers} | {"network.head.0.weight"}
    norm = {f"network.embedding_norm.norm.{name}" for name in ("weight", "alpha", "beta")}
    assert norm | {"values.scale", "values.bias", "network.logit.bias"} <= kinds["other"]
    assert set().union(*kinds.values()) == set(names.values())
    assert sum(map(len, kinds.values())) == len(names)


def test_only_what_is_trained_has_a_group() -> None:
    model = a_model()
    trained = [p for name, p in dense_parameters(model).items() if "norm" in name or "logit" in name]
    optimizer = Scale(model.network, trained, lr=LR, weight_decay=DECAY)
    assert [group["kind"] for group in optimizer.param_groups] == ["last", "other"]


def test_rows_without_a_gradient_do_not_explode() -> None:
    model = a_model()
    optimizer = scale_of(model)
    linear = model.network.blocks[0].linear
    before = linear.weight.detach().clone()
    gradients(model, 1)
    assert linear.weight.grad is not None
    linear.weight.grad[0] = 0.0
    linear.weight.grad[1] = 1e-20  # less than the smallest divisor, 1e-8: the row moves by less than the rate
    gradient = linear.weight.grad.clone()
    model.network.logit.weight.grad = torch.zeros_like(model.network.logit.weight)
    last = model.network.logit.weight.detach().clone()
    optimizer.step()
    kept = 1 - LR * DECAY
    torch.testing.assert_close(linear.weight[0].detach(), kept * before[0], rtol=EXACT, atol=0)
    moved = kept * before[1] - LR * gradient[1] / 1e-8
    torch.testing.assert_close(linear.weight[1].detach(), moved, rtol=EXACT, atol=0)
    torch.testing.assert_close(model.network.logit.weight.detach(), kept * last, rtol=EXACT, atol=0)
    # a row with a gradient moves by the rate in the root mean square
    step = linear.weight[2].detach() - kept * before[2]
    assert float(step.square().mean().sqrt()) == pytest.approx(LR, rel=1e-9)  # a difference loses three digits


def test_the_closure_gives_the_loss() -> None:
    model = a_model()
    assert scale_of(model).step(lambda: 2.5) == 2.5


def test_scale_goes_on_from_its_state() -> None:
    models = [a_model()]
    optimizers = [scale_of(models[0])]

    def steps(model: MaskNet, optimizer: Scale, first: int) -> None:
        for t in range(first, first + 3):
            gradients(model, t)
            optimizer.step()

    steps(models[0], optimizers[0], 0)
    models.append(copy.deepcopy(models[0]))
    optimizers.append(scale_of(models[1], lr=1.0, weight_decay=0.0))  # the state brings these too
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip(models, optimizers, strict=True):
        steps(model, optimizer, 3)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)
    # next to no state: means for the last layer and for vectors, none for matrices
    stated = {id(p) for p, state in optimizers[0].state.items() if state}
    matrices = next(group["params"] for group in optimizers[0].param_groups if group["kind"] == "matrix")
    assert not stated & {id(p) for p in matrices}


# Normalize and project.


def projected_sets(kind: str, mask: bool) -> list[list[str]]:
    sets = [[f"blocks.{k}.linear.weight"] for k in range(2)]
    pairs = [[f"blocks.{k}.mask.project.weight", f"blocks.{k}.mask.project.bias"] for k in range(2)]
    return sets + (pairs if mask else [])


def joint_norm(state: State, names: list[str]) -> float:
    return float(np.sqrt(sum((state[name] ** 2).sum() for name in names)))


def state_of(network: nn.Module) -> State:
    return {name: p.detach().numpy().copy() for name, p in network.named_parameters()}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "scale"])
@pytest.mark.parametrize(("kind", "mask"), [("parallel", True), ("serial", True), ("parallel", False)])
def test_projection_keeps_sizes_and_nothing_else(optimizer: str, kind: str, mask: bool) -> None:
    torch.manual_seed(0)
    network = build_network(configured(kind, mask=mask, weight_standardization=kind == "serial"), F).double()
    parameters = list(network.parameters())
    stepper: torch.optim.Optimizer = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.1),
        "adam": lambda: torch.optim.Adam(parameters, lr=0.1),
        "scale": lambda: Scale(network, parameters, lr=0.1, weight_decay=0.1),
    }[optimizer]()
    project, first = Projection(network), state_of(network)
    for step in range(4):
        network.zero_grad()
        network(normal(8, F, D_FIELD, seed=step)).square().sum().backward()
        stepper.step()
        expected = state_of(network)  # the optimizer's, to be brought to the first size
        for names in projected_sets(kind, mask):
            factor = joint_norm(first, names) / joint_norm(expected, names)
            assert abs(factor - 1) > 1e3 * EXACT  # the step alone would have changed the size
            for name in names:
                expected[name] = factor * expected[name]
        project()
        for name, weight in state_of(network).items():
            np.testing.assert_allclose(weight, expected[name], rtol=EXACT, atol=0, err_msg=name)


def test_weights_of_zero_stay_zero() -> None:
    network = build_network(configured("serial"), F)
    with torch.no_grad():
        network.blocks[0].linear.weight.zero_()
    Projection(network)()
    assert not network.blocks[0].linear.weight.any()


INVARIANT = sorted(name for name, norm in NORMS.items() if norm.scale_invariant)


@pytest.mark.parametrize("kind", ["serial", "parallel"])
@pytest.mark.parametrize("name", INVARIANT)
def test_what_is_projected_has_no_scale(kind: str, name: str) -> None:
    """With next to no eps any size of these weights gives the same network; in training, by the batch's statistics."""
    torch.manual_seed(0)
    network = build_network(configured(kind, hidden_norm={"name": name, "eps": 1e-24}), F).double().train()
    x = normal(8, F, D_FIELD)
    project, state = Projection(network), state_of(network)
    expected = network(x).detach()
    assert expected.std() > 0.01
    with torch.no_grad():
        parameters = dict(network.named_parameters())
        for factor, names in zip((0.3, 7.0, 2.0, 0.5), projected_sets(kind, True), strict=True):
            for name_ in names:
                parameters[name_].mul_(factor)
    # eps of 1e-24 beside variances of 1e-3 and more: 1e-21; the rest is rounding, where a ReLU has no kink nearby
    torch.testing.assert_close(network(x).detach(), expected, rtol=0, atol=1e-10)
    project()
    for key, weight in state_of(network).items():
        np.testing.assert_allclose(weight, state[key], rtol=EXACT, atol=0, err_msg=key)
    torch.testing.assert_close(network(x).detach(), expected, rtol=0, atol=1e-10)


def test_a_mask_without_its_bias_would_have_a_scale() -> None:
    """Why weight and bias of a mask's last layer are projected together."""
    torch.manual_seed(0)
    network = build_network(configured("parallel", hidden_norm={"name": "layer", "eps": 1e-24}), F).double()
    x = normal(8, F, D_FIELD)
    expected = network(x).detach()
    with torch.no_grad():
        network.blocks[0].mask.project.weight.mul_(7.0)
    assert (network(x) - expected).abs().max() > 1e-3


def settings(**model: object) -> dict[str, object]:
    dense = {"normalize_and_project": True}
    tracking = {"registered_model": "x"}
    return {"experiment": "x", "model": model, "optimizer": {"dense": dense}, "tracking": tracking}


@pytest.mark.parametrize("kind", ["serial", "parallel"])
@pytest.mark.parametrize("name", NORMS)
def test_only_norms_that_see_no_factor_are_projected(kind: str, name: str) -> None:
    model = {"kind": kind, "head": [], "hidden_norm": name}
    if name in ("layer", "rms", "variance_only", "l1", "conditional", "bhyt", "batch", "power_v"):
        assert Config.model_validate(settings(**model)).optimizer.dense.normalize_and_project
    else:
        with pytest.raises(ValidationError, match=f"a hidden norm right after W .* here it is {name}, kind {kind}"):
            Config.model_validate(settings(**model))


@pytest.mark.parametrize(
    "model",
    [{"kind": "residual_serial", "head": []}, {"feed_forward": False, "hidden_norm": "none"}],
    ids=["residual", "masks only"],
)
def test_networks_without_a_norm_after_w_are_not_projected(model: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="normalize_and_project needs a hidden norm right after W"):
        Config.model_validate(settings(**model))


# Inside training.


@pytest.fixture(scope="module")
def planted_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clicks that depend on a product of two fields, which no sum of their effects can express."""
    home = tmp_path_factory.mktemp("planted")
    random = np.random.default_rng(0)
    a_N, b_N = random.integers(0, 8, 6000), random.integers(0, 8, 6000)
    click_N = random.random(6000) < np.where((a_N + b_N) % 2 == 0, 0.9, 0.1)
    pd.DataFrame({"a": a_N, "b": b_N, "click": click_N.astype(int)}).to_parquet(home / "rows.parquet")
    fields = [{"name": name, "type": "categorical"} for name in "ab"]
    schema = Schema.model_validate({"name": "planted", "label": {"column": "click"}, "fields": fields})
    source = {"input": [str(home / "rows.parquet")]}
    prepare(schema, source, home / "data", split=SplitRule.parse("random:0.8,0.1,0.1"))
    return home / "data"


def small(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text("experiment: planted\ntracking: {registered_model: planted}\n")
    model = ["model.embedding_dim=4", "model.block_width=16", "model.head=[8]", "model.blocks=2"]
    rest = ["optimizer.sparse={name: rowwise_adagrad, lr: 0.1}", "train.batch_size=256", "train.epochs=4"]
    return load_config(path, [*model, *rest, *overrides])


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("dense", ["{name: scale, lr: 0.005, weight_decay: 0.01", "{name: adam, lr: 0.005"])
def test_an_interaction_is_learned(
    config: Config, planted_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense: str, project: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = small(tmp_path, f"optimizer.dense={dense}, normalize_and_project: {str(project).lower()}}}")
    result = train(mine, planted_data, tmp_path / "out", QUIET)
    assert result is not None
    # the best possible is .9, give or take .02 on 600 rows; chance is .5
    assert result["metrics"]["test"]["auc"] > 0.85
    torch.manual_seed(mine.train.seed)
    first = state_of(build_model(mine.model, PreparedDataset.open(planted_data), "meta").network)
    last = state_of(load_bundle(Path(result["bundle"])).scorer.models[0].network)
    assert all(not np.array_equal(last[name], first[name]) for name in first)
    for names in projected_sets("parallel", True):
        if project:  # fp32, which a factor rounds by 6e-8 in each of 76 steps, and a sum of 128 squares by some more
            assert joint_norm(last, names) == pytest.approx(joint_norm(first, names), rel=1e-5)
        else:
            assert joint_norm(last, names) != pytest.approx(joint_norm(first, names), rel=1e-3)
