"""Value fields and shared tables against the definition, written out with numpy in fp64.

Legend: B rows, F fields, V of them with values, d embedding width.
"""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from masknet.config import MaskNetConfig
from masknet.model import MaskNet, Table, table_key
from masknet.networks import build_network
from masknet.values import ValueEmbedding, ValueField

NORMS = ("layer", "rms", "none")  # those that the reference here knows
D, B = 5, 4
TABLES = (
    Table(name="item", features=("item", "history"), rows=6, pooling="mean"),
    Table(name="user", features=("user",), rows=4, pooling="sum"),
)
# neither kind stands together, and one value field is normalized
FIELDS = (
    ValueField(name="price"),
    "history",
    ValueField(name="age", normalize=True),
    "user",
    "item",
    ValueField(name="rating"),
)
RAW = (0, 5)
IDS = {"item": [[1], [5], [0], [2]], "user": [[3], [0], [1], [3]], "history": [[5, 1], [5], [2, 2, 4], [0, 1]]}
VALUES = np.array([[0.7, -1.2, 30.0], [0.0, 0.4, 0.0], [2.5, 0.0, -3.0], [0.0, 0.0, 0.0]])
MISSING = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 1]])

State = dict[str, np.ndarray]


def state_of(module: nn.Module) -> State:
    return {key: value.double().numpy() for key, value in module.state_dict().items()}


def linear(state: State, key: str, x: np.ndarray) -> np.ndarray:
    return x @ state[f"{key}.weight"].T + state.get(f"{key}.bias", 0.0)


def norm(name: str, x: np.ndarray, state: State, key: str) -> np.ndarray:
    if name == "none":
        return x
    centred = x - x.mean(-1, keepdims=True) if name == "layer" else x
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * state[f"{key}.weight"] + state.get(f"{key}.bias", 0.0)


def network_logits(config: MaskNetConfig, state: State, emb: np.ndarray, raw: tuple[int, ...]) -> np.ndarray:
    """The network's answer to embeddings [B, F, d], the fields in `raw` left out of LN_EMB."""
    normed, fields = emb.copy(), [f for f in range(emb.shape[1]) if f not in raw]
    if fields:
        key = "embedding_norm.norm" if raw else "embedding_norm"
        normed[:, fields] = norm(config.embedding_norm.name, emb[:, fields], state, key)
    whole, x = emb.reshape(len(emb), -1), normed.reshape(len(emb), -1)
    outputs = []
    for k in range(config.blocks):
        aggregate = np.maximum(linear(state, f"blocks.{k}.mask.aggregate", whole), 0)
        hidden = linear(state, f"blocks.{k}.linear", linear(state, f"blocks.{k}.mask.project", aggregate) * x)
        outputs.append(np.maximum(norm(config.hidden_norm.name, hidden, state, f"blocks.{k}.norm"), 0))
        x = outputs[-1] if config.kind == "serial" else x
    x = outputs[-1] if config.kind == "serial" else np.concatenate(outputs, 1)
    for i in range(len(config.head)):
        x = np.maximum(linear(state, f"head.{3 * i}", x), 0)
    return linear(state, "logit", x)[:, 0]


def embedded(model: MaskNet) -> np.ndarray:
    """Embeddings [B, F, d] by hand."""
    state = state_of(model)
    columns = []
    for field in model.field_names:
        if field in IDS:
            index = next(i for i, table in enumerate(TABLES) if field in table.features)
            rows = state[f"embeddings.embedding_bags.{table_key(index)}.weight"]
            columns.append(np.stack([rows[bag].mean(0) for bag in IDS[field]]))
        else:
            v = ["price", "age", "rating"].index(field)
            scale, bias, missing = (state[f"values.{name}"][v] for name in ("scale", "bias", "missing"))
            columns.append(VALUES[:, v, None] * scale + bias + MISSING[:, v, None] * missing)
    return np.stack(columns, 1)


def configured(kind: str, embedding_norm: str = "layer") -> MaskNetConfig:
    shape = {"kind": kind, "blocks": 2, "head": [4] if kind == "parallel" else [], "embedding_dim": D, "block_width": 7}
    return MaskNetConfig.model_validate({**shape, "embedding_norm": embedding_norm})


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return module


def a_model(kind: str = "parallel", embedding_norm: str = "layer") -> MaskNet:
    model = randomized(MaskNet(configured(kind, embedding_norm), TABLES, FIELDS))
    assert isinstance(model, MaskNet)
    return model


def batch(names: tuple[str, ...] = ("item", "user", "history")) -> tuple[KeyedJaggedTensor, torch.Tensor, torch.Tensor]:
    bags = [bag for name in names for bag in IDS[name]]
    ids = KeyedJaggedTensor(
        list(names), torch.tensor([id for bag in bags for id in bag]), lengths=torch.tensor([len(bag) for bag in bags])
    )
    return ids, torch.tensor(VALUES, dtype=torch.float32), torch.tensor(MISSING, dtype=torch.float32)


@pytest.mark.parametrize("raw", [(0,), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize(("kind", "name"), list(product(["serial", "parallel"], NORMS)))
def test_network_that_leaves_fields_out_of_the_norm_fp64(kind: str, name: str, raw: tuple[int, ...]) -> None:
    config = configured(kind, name)
    network = randomized(build_network(config, 4, raw)).double()
    emb = np.random.default_rng(5).normal(size=(B, 4, D)) + 0.3
    expected = network_logits(config, state_of(network), emb, raw)
    assert expected.std() > 0.05  # else a constant would pass
    # fp64, sums of at most 40 products of numbers below 10
    np.testing.assert_allclose(network(torch.tensor(emb)).detach().numpy(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("kind", "name"), list(product(["serial", "parallel"], NORMS)))
def test_model_with_mixed_fields(kind: str, name: str) -> None:
    model = a_model(kind, name)
    expected = network_logits(configured(kind, name), state_of(model.network), embedded(model), RAW)
    assert expected.std() > 0.05
    # fp32 against fp64 over values of up to 30: a dozen layers, each off by a few ulps of 1.2e-7
    np.testing.assert_allclose(model(*batch()).detach().numpy(), expected, rtol=2e-5, atol=2e-5)


def test_fields_of_a_table_have_equal_embeddings_for_equal_ids() -> None:
    pooled = a_model().embeddings(batch()[0])
    assert torch.equal(pooled["item"][1], pooled["history"][1])  # 5 and [5]
    assert not torch.equal(pooled["item"][0], pooled["history"][0])


class Reordered(nn.Module):
    """Tables that give their embeddings in another order, as a sharding plan may."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, ids: KeyedJaggedTensor) -> KeyedTensor:
        pooled = self.tables(ids)
        order = ["user", "history", "item"]
        return KeyedTensor.from_tensor_list(order, [pooled[name] for name in order])


def test_order_of_ids_and_of_the_tables_output_does_not_matter() -> None:
    model = a_model()
    expected = model(*batch())
    assert torch.equal(model(*batch(("history", "item", "user"))), expected)
    model.embeddings = Reordered(model.embeddings)
    assert torch.equal(model(*batch()), expected)


def test_gradients_reach_values_and_shared_tables() -> None:
    model = a_model()
    model(*batch()).sum().backward()
    rows = model.embeddings.embedding_bags[table_key(0)].weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert rows == [0, 1, 2, 4, 5]
    assert model.values is not None
    assert all((parameter.grad != 0).any(1).all() for parameter in model.values.parameters())


def test_value_embedding_gradients() -> None:
    module = randomized(ValueEmbedding(["a", "b"], 3)).double()
    x, missing = torch.randn(4, 2, dtype=torch.float64, requires_grad=True), torch.eye(4, 2, dtype=torch.float64)
    assert gradcheck(lambda x, *_: module(x, missing).values(), (x, *module.parameters()))


def test_value_embeddings_start_as_rows_of_tables_do() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = ValueEmbedding([str(i) for i in range(400)], 25)
    for parameter in module.state_dict().values():
        # 10,000 draws: the standard errors are 7.1e-5 (of the deviation) and 1e-4 (of the mean); five of each
        assert float(parameter.std()) == pytest.approx(0.01, abs=3.6e-4)
        assert float(parameter.mean()) == pytest.approx(0.0, abs=5e-4)


def test_without_value_fields_there_is_nothing_of_them() -> None:
    names = ("item", "user", "history")
    model = MaskNet(configured("serial"), TABLES, names)
    block = ["mask.aggregate.weight", "mask.aggregate.bias", "mask.project.weight", "mask.project.bias"]
    keys = [f"blocks.{k}.{key}" for k in (0, 1) for key in [*block, "linear.weight", "norm.weight", "norm.bias"]]
    network = ["embedding_norm.weight", "embedding_norm.bias", *keys, "logit.weight", "logit.bias"]
    assert list(model.dense_state()) == network
    tables = [f"embeddings.embedding_bags.{table_key(i)}.weight" for i in (0, 1)]
    assert list(model.state_dict()) == [*tables, *(f"network.{key}" for key in network)]


def test_weights_go_from_model_to_model() -> None:
    one, two = a_model(), MaskNet(configured("parallel"), TABLES, FIELDS)
    dense = one.dense_state()
    assert {"values.scale", "values.bias", "values.missing", "embedding_norm.norm.weight"} < dense.keys()
    assert dense["values.scale"].shape == (3, D)
    assert dense["embedding_norm.norm.weight"].shape == (4, D)
    two.load_weights(dense, [bag.weight.detach() for bag in one.embeddings.embedding_bags.values()])
    assert torch.equal(two(*batch()), one(*batch()))
    dense["values.scale"] = dense["values.scale"][:2]
    with pytest.raises(RuntimeError, match=r"size mismatch for values\.scale"):
        two.load_weights(dense, [bag.weight.detach() for bag in one.embeddings.embedding_bags.values()])


def test_a_model_without_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="no field has ids"):
        MaskNet(configured("parallel"), (), (ValueField(name="age"),))
