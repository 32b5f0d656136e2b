"""What a configuration's optimizers do to weights, by references that are written out or not ours."""

from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.nn.functional import binary_cross_entropy_with_logits

from features.errors import InputError
from masknet.model import MaskNet
from tests.training.placed import TABLES, batches, configured, placed, unsharded
from training.config import Config
from training.distributed import World, join_world
from training.embeddings.sharding import gather_tables
from training.optim.optimizers import build_optimizer, prepare_for_load

STEPS, FUSED_EPS = 4, 1e-8


def trained(config: Config, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Weights after so many steps in one process, the tables' under their names."""
    with join_world() as world:
        dmp, model = placed(config, world)
        optimizer = build_optimizer(dmp, config, model.network)
        for batch in batches(steps):
            optimizer.zero_grad()
            loss, _ = dmp(batch)
            loss.backward()
            optimizer.step()
        return {**model.dense_state(), **gather_tables(dmp, [table.name for table in TABLES])}


def by_hand(config: Config, dense: Any, tables: Any, *, clip: float | None = None, l2: float = 0.0) -> Any:
    """The same by the unsharded model, with a torch optimizer for the network and a function for the tables."""
    model = unsharded(config)
    weights = [bag.weight for bag in model.embeddings.embedding_bags.values()]
    network = [p for name, p in model.named_parameters() if not name.startswith("embeddings")]
    optimizer, states = dense(network), [torch.zeros_like(weight) for weight in weights]
    for batch in batches(STEPS):
        model.zero_grad()
        emb_BFD = model.embed(*batch.inputs)
        loss_B = binary_cross_entropy_with_logits(model.network(emb_BFD), batch.label_B, reduction="none")
        loss_B = loss_B + l2 / 2 * emb_BFD.flatten(1).norm(dim=1) ** 2
        (loss_B * batch.weight_B).sum().backward()
        if clip is not None:
            norm = torch.cat([p.grad.flatten() for p in network]).norm()
            assert norm > clip
            for p in network:
                p.grad *= clip / norm
        optimizer.step()
        with torch.no_grad():
            for weight, state in zip(weights, states, strict=True):
                weight -= tables(weight.grad, state)
    names = [table.name for table in TABLES]
    return {**model.dense_state(), **{name: w.detach() for name, w in zip(names, weights, strict=True)}}


def near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def plain_sgd(network: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(network, lr=0.1)


def sgd(grad: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    return 0.5 * grad


def adagrad(grad: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    state += grad**2
    return 0.02 * grad / (state.sqrt() + FUSED_EPS)


def rowwise(grad: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    state += (grad**2).mean(1, keepdim=True)
    return 0.02 * grad / (state.sqrt() + FUSED_EPS)


def settings(name: str, lr: float, kind: str = "table_wise", /, **dense: Any) -> dict[str, Any]:
    optimizer = {"dense": {"name": "sgd", "lr": 0.1, **dense}, "sparse": {"name": name, "lr": lr}}
    return {"optimizer": optimizer, "sharding": {"type": kind}, "train": {"gradient_clip": None}}


@pytest.mark.parametrize("kind", ["table_wise", "data_parallel"])
@pytest.mark.parametrize(
    ("name", "lr", "update"), [("sgd", 0.5, sgd), ("adagrad", 0.02, adagrad), ("rowwise_adagrad", 0.02, rowwise)]
)
def test_tables_are_trained_by_the_method_that_is_named_wherever_they_lie(
    kind: str, name: str, lr: float, update: Any
) -> None:
    config = configured(**settings(name, lr, kind))
    near(trained(config), by_hand(config, plain_sgd, update))


@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        ({"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, torch.optim.SGD),
        ({"name": "adam", "lr": 0.001, "weight_decay": 0.01}, torch.optim.Adam),
        ({"name": "adamw", "lr": 0.001, "weight_decay": 0.1}, torch.optim.AdamW),
        ({"name": "adagrad", "lr": 0.001, "weight_decay": 0.01}, torch.optim.Adagrad),
    ],
)
def test_the_network_is_trained_by_torchs_optimizer_of_the_name(own: dict[str, Any], theirs: Any) -> None:
    config = configured(**settings("sgd", 0.5, **own))
    keywords = {key: value for key, value in own.items() if key != "name"}
    # Adam divides by what may be next to nothing: 1e-7 of a gradient becomes 1e-5 of a weight
    near(trained(config), by_hand(config, lambda network: theirs(network, **keywords), sgd), atol=2e-5)


def test_the_limit_is_on_the_networks_gradients_together_and_not_on_the_tables() -> None:
    config = configured(**settings("sgd", 0.5) | {"train": {"gradient_clip": 0.05}})
    near(trained(config), by_hand(config, plain_sgd, sgd, clip=0.05))


def test_l2_of_the_embeddings_is_a_part_of_the_gradient_and_not_of_the_reported_loss() -> None:
    config = configured(**settings("sgd", 0.5))
    penalized = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"embedding_l2": 0.3})})
    near(trained(penalized), by_hand(config, plain_sgd, sgd, l2=0.3))
    with join_world() as world:
        losses = [placed(each, world)[0](batches(1)[0]) for each in (config, penalized)]
    assert torch.equal(losses[0][1].loss, losses[1][1].loss)
    assert losses[1][0] > losses[0][0] + 0.01


@pytest.mark.parametrize("kind", ["table_wise", "data_parallel"])
def test_frozen_tables_stay_as_they_are(kind: str) -> None:
    sections = settings("rowwise_adagrad", 0.5, kind)
    config = configured(**sections | {"train": {"gradient_clip": None, "train_only_affine": True}})
    before, after = trained(config, 0), trained(config)
    assert all(torch.equal(before[table.name], after[table.name]) for table in TABLES)
    assert not torch.equal(before["logit.weight"], after["logit.weight"])


def test_half_precision_tables_are_trained_and_gathered_in_fp32() -> None:
    config = configured(**settings("sgd", 2.0))
    halved = config.model_copy(update={"sharding": config.sharding.model_copy(update={"dtype": "fp16"})})
    start, full, half = trained(config, 0), trained(config), trained(halved)
    for table in TABLES:
        weight = half[table.name]
        assert weight.dtype == torch.float32
        assert torch.equal(weight, weight.half().float())
        # 11 bits of .1 are off by 2e-5, of changes of .01 at least; without training the ratio would be 1
        change = full[table.name] - start[table.name]
        assert (weight - full[table.name]).norm() < 0.05 * change.norm()


def state_of(config: Config, world: World, steps: int) -> tuple[Any, MaskNet, Any]:
    dmp, model = placed(config, world)
    optimizer = build_optimizer(dmp, config, model.network)
    for batch in batches(steps):
        optimizer.zero_grad()
        dmp(batch)[0].backward()
        optimizer.step()
    return dmp, model, optimizer


@pytest.mark.parametrize(
    ("dense", "sparse", "kind"),
    [
        ("adam", "sgd", "table_wise"),
        ("adamw", "rowwise_adagrad", "data_parallel"),
        ("sgd", "adagrad", "table_wise"),
        ("adagrad", "adagrad", "data_parallel"),
        ("scale", "sgd", "data_parallel"),
    ],
)
def test_a_prepared_optimizer_has_a_place_for_all_state_and_leaves_the_weights(
    dense: str, sparse: str, kind: str, tmp_path: Any
) -> None:
    """Then training goes on from a checkpoint bit by bit as if it had not ended."""
    own = {"name": dense, "lr": 0.01, "weight_decay": 0.1, **({"momentum": 0.9} if dense == "sgd" else {})}
    config = configured(**settings(sparse, 0.1, kind, **own))
    with join_world() as world:
        dmp, model, optimizer = state_of(config, world, 3)
        dcp.save({"model": dmp.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path / "at 3")
        whole = state_of(config, world, 6)[1].dense_state()
        dmp, model, optimizer = state_of(config, world, 0)
        before = model.dense_state()
        prepare_for_load(optimizer)
        assert all(torch.equal(weight, before[name]) for name, weight in model.dense_state().items())
        assert all(parameter.grad is None for parameter in model.network.parameters())
        state = {"model": dmp.state_dict(), "optimizer": optimizer.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path / "at 3")
        dmp.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for batch in batches(6)[3:]:
            optimizer.zero_grad()
            dmp(batch)[0].backward()
            optimizer.step()
        for name, weight in model.dense_state().items():
            assert torch.equal(weight, whole[name]), name


@pytest.mark.parametrize("name", ["adam", "adamw", "adagrad", "scale"])
def test_momentum_is_of_sgd_alone(name: str) -> None:
    with pytest.raises(ValueError, match=f"momentum is of sgd; {name} has none to set"):
        configured(optimizer={"dense": {"name": name, "momentum": 0.9}})


def test_what_fbgemm_would_ignore_is_refused() -> None:
    with (
        join_world() as world,
        pytest.raises(InputError, match=r"weight_decay 0.1: on cpu .* fused sgd would ignore it"),
    ):
        placed(configured(optimizer={"sparse": {"name": "sgd", "weight_decay": 0.1}}), world)
