"""Blocks, networks and the whole model against the definition (arXiv 2102.07619), written out row by row in fp64.

Legend: B rows, F fields, d embedding width, D = F·d, z width of what is masked, K blocks, h block width.
"""

import math
from itertools import product
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from masknet.blocks import InstanceGuidedMask, MaskBlock
from masknet.config import MaskNetConfig
from masknet.model import MaskNet, Table, table_key
from masknet.networks import ParallelMaskNet, SerialMaskNet, build_network
from masknet.norms import make_norm

NORMS = ("layer", "rms", "none")  # those that the reference here knows
F, D_FIELD, H = 3, 5, 7
NORM_PAIRS = list(product(NORMS, NORMS))
SHAPES = [("serial", 1, ()), ("serial", 3, ())] + [("parallel", k, head) for k in (1, 3) for head in ((), (4, 6))]

State = dict[str, np.ndarray]
M = TypeVar("M", bound=nn.Module)


# The definition. Vectors are lists of floats, weights come from a state_dict; math.fsum rounds a sum only once.


def relu(vector: list[float]) -> list[float]:
    return [max(value, 0.0) for value in vector]


def affine(state: State, key: str, vector: list[float]) -> list[float]:
    weight = state[f"{key}.weight"]
    bias = state.get(f"{key}.bias", np.zeros(len(weight)))
    rows = range(len(weight))
    return [math.fsum([float(bias[i]), *(float(w) * v for w, v in zip(weight[i], vector, strict=True))]) for i in rows]


def normalized(name: str, eps: float, vector: list[float], weight: np.ndarray, bias: np.ndarray) -> list[float]:
    if name == "none":
        return vector
    mean = math.fsum(vector) / len(vector) if name == "layer" else 0.0
    root = math.sqrt(math.fsum((value - mean) ** 2 for value in vector) / len(vector) + eps)
    return [float(weight[i]) * (value - mean) / root + float(bias[i]) for i, value in enumerate(vector)]


def embedding_norm(config: MaskNetConfig, state: State, row: np.ndarray) -> list[float]:
    """concat(LN_1(e_1), …, LN_F(e_F)), each with an affine of its own."""
    out: list[float] = []
    for f, field in enumerate(row.tolist()):
        weight = state.get("embedding_norm.weight", np.ones(row.shape))[f]
        bias = state.get("embedding_norm.bias", np.zeros(row.shape))[f]
        out += normalized(config.embedding_norm.name, config.embedding_norm.eps, field, weight, bias)
    return out


def mask_block(config: MaskNetConfig, state: State, key: str, x: list[float], raw: list[float]) -> list[float]:
    """relu(LN_HID(W (m ⊙ x))) with m = W2 · relu(W1 · raw + b1) + b2."""
    mask = affine(state, f"{key}mask.project", relu(affine(state, f"{key}mask.aggregate", raw)))
    hidden = affine(state, f"{key}linear", [m * value for m, value in zip(mask, x, strict=True)])
    weight = state.get(f"{key}norm.weight", np.ones(len(hidden)))
    bias = state.get(f"{key}norm.bias", np.zeros(len(hidden)))
    return relu(normalized(config.hidden_norm.name, config.hidden_norm.eps, hidden, weight, bias))


def logit(config: MaskNetConfig, state: State, row: np.ndarray) -> float:
    """The network's answer to one row's embeddings [F, d]."""
    raw = [value for field in row.tolist() for value in field]
    x = embedding_norm(config, state, row)
    keys = [f"blocks.{k}." for k in range(config.blocks)]
    if config.kind == "serial":
        for key in keys:
            x = mask_block(config, state, key, x, raw)
    else:
        x = [value for key in keys for value in mask_block(config, state, key, x, raw)]
        for i in range(len(config.head)):
            x = relu(affine(state, f"head.{3 * i}", x))  # linear, ReLU and dropout make three entries a layer
    return affine(state, "logit", x)[0]


def reference(config: MaskNetConfig, network: nn.Module, emb: torch.Tensor) -> torch.Tensor:
    state = state_of(network)
    return torch.tensor([logit(config, state, row) for row in emb.double().numpy()], dtype=torch.float64)


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
            if key.endswith(".weight") and "norm" not in key and "embedding_bags" not in key:
                parameter.mul_(2 / math.sqrt(parameter.shape[1]))
    return module


def configured(
    kind: str = "parallel", blocks: int = 2, head: tuple[int, ...] | None = None, **rest: object
) -> MaskNetConfig:
    values = {"kind": kind, "blocks": blocks, "head": ((4,) if kind == "parallel" else ()) if head is None else head}
    return MaskNetConfig.model_validate({"embedding_dim": D_FIELD, "block_width": H, **values, **rest})


def a_block(norm: str = "layer", dropout: float = 0.0) -> MaskBlock:
    mask = InstanceGuidedMask(F * D_FIELD, 4, 2.0)
    return randomized(MaskBlock(mask, 4, H, make_norm(norm, (H,), eps=1e-5), dropout))


def fill(linear: nn.Linear, weight: float, bias: float) -> None:
    with torch.no_grad():
        linear.weight.fill_(weight)
        linear.bias.fill_(bias)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # fp64: sums of at most 30 products of numbers below 10, each off by 1e-15; the errors seen are below 1e-14
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# Mask and block.


@pytest.mark.parametrize(("masked_width", "ratio"), [(15, 2.0), (4, 0.5), (7, 1.5), (1, 1.0)])
def test_mask(masked_width: int, ratio: float) -> None:
    mask, raw = randomized(InstanceGuidedMask(15, masked_width, ratio)), normal(4, 15)
    assert mask.aggregate.out_features == int(ratio * masked_width)
    state = state_of(mask)
    rows = [affine(state, "project", relu(affine(state, "aggregate", row))) for row in raw.tolist()]
    close(mask(raw), torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize(("masked_width", "ratio"), [(4, 0.2), (1, 0.5), (400, 0.001)])
def test_a_ratio_that_leaves_no_unit(masked_width: int, ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"reduction_ratio {ratio} .* {masked_width}$"):
        InstanceGuidedMask(15, masked_width, ratio)


def test_a_networks_ratio_that_leaves_no_unit() -> None:
    # 15 embedding values leave 3 units, but the second block masks only 7 hidden ones
    with pytest.raises(ValueError, match=r"reduction_ratio 0\.14 "):
        build_network(configured("serial", reduction_ratio=0.14), F)


@pytest.mark.parametrize("norm", NORMS)
def test_block(norm: str) -> None:
    block, x, raw = a_block(norm), normal(6, 4, seed=1), normal(6, 15)
    config, state = configured(hidden_norm=norm), state_of(block)
    rows = [mask_block(config, state, "", *vectors) for vectors in zip(x.tolist(), raw.tolist(), strict=True)]
    close(block(x, raw), torch.tensor(rows, dtype=torch.float64))


def test_block_parameters() -> None:
    keys = ["mask.aggregate.weight", "mask.aggregate.bias", "mask.project.weight", "mask.project.bias"]
    assert list(a_block().state_dict()) == [*keys, "linear.weight", "norm.weight", "norm.bias"]


def test_norm_stands_before_the_relu() -> None:
    block, x, raw = a_block(), normal(50, 4, seed=1), normal(50, 15)
    with torch.no_grad():
        block.norm.weight.fill_(1.0)
        block.norm.bias.zero_()
    out = block(x, raw).detach()
    # what a norm puts out has mean 0 and its ReLU does not; a norm of a ReLU would have negative values
    assert float(out.min()) == 0.0
    assert 0.3 < float((out == 0).double().mean()) < 0.7
    assert float(out.mean(dim=1).min()) > 0.1


def test_mask_of_zeros_leaves_the_norms_bias() -> None:
    block = a_block()
    fill(block.mask.project, 0.0, 0.0)
    expected = torch.tensor(relu(block.norm.bias.tolist()), dtype=torch.float64)
    assert 0 < int((expected == 0).sum()) < H
    assert torch.equal(block(normal(4, 4, seed=1), normal(4, 15)), expected.expand(4, H))


@pytest.mark.parametrize("norm", NORMS)
def test_mask_of_ones_is_the_identity(norm: str) -> None:
    block, x = a_block(norm), normal(4, 4, seed=1)
    fill(block.mask.project, 0.0, 1.0)
    assert torch.equal(block(x, normal(4, 15)), torch.relu(block.norm(block.linear(x))))


def test_mask_does_not_see_what_it_masks() -> None:
    block, masks = a_block(), []
    block.mask.register_forward_hook(lambda _module, _inputs, mask: masks.append(mask))
    raw = normal(4, 15)
    for x, embedding in [(normal(4, 4, seed=1), raw), (normal(4, 4, seed=2), raw), (normal(4, 4, seed=1), raw + 1)]:
        block(x, embedding)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


# Networks.


@pytest.mark.parametrize(("embedding", "hidden"), NORM_PAIRS)
@pytest.mark.parametrize(("kind", "blocks", "head"), SHAPES)
def test_network_fp64(kind: str, blocks: int, head: tuple[int, ...], embedding: str, hidden: str) -> None:
    config = configured(kind, blocks, head, embedding_norm=embedding, hidden_norm=hidden)
    network, emb = randomized(build_network(config, F)), normal(4, F, D_FIELD) + 0.3
    out = network(emb).detach()
    assert out.shape == (4,)
    assert float(out.std()) > 0.05  # else a constant would pass
    close(out, reference(config, network, emb))


@pytest.mark.parametrize("kind", ["serial", "parallel"])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.7])
def test_network_with_other_ratios_and_eps(kind: str, ratio: float) -> None:
    norms = {"embedding_norm": {"name": "layer", "eps": 0.5}, "hidden_norm": {"name": "rms", "eps": 0.25}}
    config = configured(kind, reduction_ratio=ratio, **norms)
    network, emb = randomized(build_network(config, F)), normal(4, F, D_FIELD)
    close(network(emb), reference(config, network, emb))


@pytest.mark.parametrize("kind", ["serial", "parallel"])
def test_network_fp32(kind: str) -> None:
    config = configured(kind, 3)
    network, emb = randomized(build_network(config, F), torch.float32), normal(64, F, D_FIELD).float()
    out = network(emb)
    assert out.dtype == torch.float32
    # a dozen layers in a row, each off by a few ulps of 1.2e-7 in numbers of a few units; a tenth of it is seen
    torch.testing.assert_close(out.double(), reference(config, network, emb), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["serial", "parallel"])
def test_every_mask_reads_the_raw_embedding(kind: str) -> None:
    network, emb = randomized(build_network(configured(kind, 3), F)), normal(4, F, D_FIELD)
    seen: list[torch.Tensor] = []
    for block in network.blocks:
        block.mask.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    network(emb)
    assert len(seen) == 3
    assert all(torch.equal(raw, emb.reshape(4, F * D_FIELD)) for raw in seen)


def test_serial_first_block_reads_the_normalized_embedding_and_later_ones_the_block_before() -> None:
    network, emb = randomized(build_network(configured("serial", 3), F)), normal(4, F, D_FIELD)
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    for block in network.blocks:
        block.register_forward_hook(lambda _module, given, out: (inputs.append(given[0]), outputs.append(out))[0])
    network(emb)
    assert torch.equal(inputs[0], network.embedding_norm(emb).flatten(1))
    assert torch.equal(inputs[1], outputs[0])
    assert torch.equal(inputs[2], outputs[1])


@pytest.mark.parametrize(("embedding", "hidden"), [("layer", "layer"), ("rms", "rms"), ("none", "layer")])
@pytest.mark.parametrize(("kind", "head"), [("serial", ()), ("parallel", (2,))])
def test_network_gradients(kind: str, head: tuple[int, ...], embedding: str, hidden: str) -> None:
    sizes = {"embedding_dim": 3, "block_width": 4, "reduction_ratio": 0.5}
    config = configured(kind, 2, head, embedding_norm=embedding, hidden_norm=hidden, **sizes)
    network, emb = randomized(build_network(config, 2)), normal(3, 2, 3).requires_grad_()
    names = [key for key, _ in network.named_parameters()]

    def call(emb: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return functional_call(network, dict(zip(names, parameters, strict=True)), (emb,))

    assert gradcheck(call, (emb, *network.parameters()))


@pytest.mark.parametrize("kind", ["serial", "parallel"])
def test_batch_of_one_and_empty_batch(kind: str) -> None:
    network, emb = randomized(build_network(configured(kind), F)), normal(4, F, D_FIELD)
    assert network(emb[:1]).shape == (1,)
    close(network(emb[2:3]), network(emb)[2:3])
    assert network(emb[:0]).shape == (0,)


def test_kind_chooses_the_class() -> None:
    assert type(build_network(configured("serial"), F)) is SerialMaskNet
    assert type(build_network(configured("parallel"), F)) is ParallelMaskNet


def halved_or_doubled(eval_out: torch.Tensor, train_out: torch.Tensor) -> None:
    """With dropout 0.5 every value is either dropped or doubled, and some of each happen."""
    kept = train_out != 0
    assert torch.equal(train_out[kept], 2 * eval_out[kept])
    # 3,000 or more values: a share's standard error is below .01
    assert float(kept[eval_out != 0].double().mean()) == pytest.approx(0.5, abs=0.05)


def test_block_drops_only_in_training() -> None:
    block, x, raw = a_block(dropout=0.5), normal(1000, 4, seed=1), normal(1000, 15)
    expected = a_block()(x, raw)
    assert torch.equal(block.eval()(x, raw), expected)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        halved_or_doubled(expected, block.train()(x, raw))


@pytest.mark.parametrize("kind", ["serial", "parallel"])
def test_network_drops_only_in_training(kind: str) -> None:
    config = configured(kind, dropout=0.5)
    network, emb = randomized(build_network(config, F)), normal(4, F, D_FIELD)
    close(network.eval()(emb), reference(config, network, emb))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first, second = network.train()(emb), network(emb)
    assert not torch.equal(first, second)


def test_head_drops_only_in_training() -> None:
    network = randomized(build_network(configured(head=(40, 30), dropout=0.5), F))
    drops = [layer for layer in network.head if isinstance(layer, nn.Dropout)]
    assert [drop.p for drop in drops] == [0.5, 0.5]
    x = torch.ones(100, 30, dtype=torch.float64)
    assert torch.equal(network.eval().head[-1](x), x)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        halved_or_doubled(x, network.train().head[-1](x))


# The whole model. Neither its own order nor the tables' is alphabetical, and the batch comes in yet another one.

TABLES = (
    Table(name="user", features=("user",), rows=7, pooling="sum"),
    Table(name="ad", features=("ad",), rows=5, pooling="mean"),
    Table(name="tags", features=("tags",), rows=6, pooling="mean"),
    Table(name="genres", features=("genres",), rows=4, pooling="sum"),
)
IDS: dict[str, list[list[int]]] = {
    "genres": [[3], [], [0, 1, 2, 3], [2, 2]],
    "ad": [[4], [0], [4], [2]],
    "user": [[6], [1], [0], [6]],
    "tags": [[5, 0, 1], [2], [], [3, 3, 4]],
}


def batch(ids: dict[str, list[list[int]]]) -> tuple[KeyedJaggedTensor, torch.Tensor, torch.Tensor]:
    """What a model without value fields reads."""
    bags = [bag for bags in ids.values() for bag in bags]
    jagged = KeyedJaggedTensor(
        keys=list(ids),
        values=torch.tensor([row for bag in bags for row in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in bags], dtype=torch.int32),
    )
    return jagged, torch.empty(4, 0), torch.empty(4, 0)


def looked_up(model: MaskNet, tables: tuple[Table, ...] = TABLES) -> torch.Tensor:
    """Embeddings [B, F, d] by hand: in the order of the tables, a list's rows summed or averaged, an empty one 0."""
    out = np.zeros((len(IDS["ad"]), len(tables), D_FIELD))
    for f, table in enumerate(tables):
        weight = model.embeddings.embedding_bags[table_key(f)].weight.detach().double().numpy()
        for b, bag in enumerate(IDS[table.name]):
            for row in bag:
                out[b, f] += weight[row] / (len(bag) if table.pooling == "mean" else 1)
    return torch.from_numpy(out)


def names_of(tables: tuple[Table, ...]) -> tuple[str, ...]:
    return tuple(table.name for table in tables)


def a_model(config: MaskNetConfig, tables: tuple[Table, ...] = TABLES) -> MaskNet:
    return randomized(MaskNet(config, tables, names_of(tables)), torch.float32)


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == torch.float32
    assert float(expected.std()) > 0.05  # else a constant would pass
    # fp32, as in test_network_fp32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["serial", "parallel"])
@pytest.mark.parametrize("norm", NORMS)
def test_model(kind: str, norm: str) -> None:
    config = configured(kind, embedding_norm=norm)
    model = a_model(config)
    near(model(*batch(IDS)).detach(), reference(config, model.network, looked_up(model)))


def test_order_of_the_batchs_keys_does_not_matter() -> None:
    model = a_model(configured())
    assert torch.equal(model(*batch(dict(sorted(IDS.items())))), model(*batch(IDS)))


class Reordered(nn.Module):
    """Tables that give their embeddings in another order, as a sharding plan may."""

    def __init__(self, tables: nn.Module, order: list[str]) -> None:
        super().__init__()
        self.tables, self.order = tables, order

    def forward(self, ids: KeyedJaggedTensor) -> KeyedTensor:
        pooled = self.tables(ids)
        return KeyedTensor.from_tensor_list(self.order, [pooled[name] for name in self.order])


@pytest.mark.parametrize("order", [["ad", "genres", "tags", "user"], ["genres", "tags", "ad", "user"]])
def test_order_of_the_tables_output_does_not_matter(order: list[str]) -> None:
    model = a_model(configured())
    expected = model(*batch(IDS))
    model.embeddings = Reordered(model.embeddings, order)
    assert torch.equal(model(*batch(IDS)), expected)


def test_order_of_fields_is_the_order_of_the_tables() -> None:
    config = configured()
    turned = TABLES[1:] + TABLES[:1]
    model = a_model(config, turned)
    near(model(*batch(IDS)).detach(), reference(config, model.network, looked_up(model, turned)))


def test_logits_are_fp32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = a_model(configured())(*batch(IDS))
    assert out.dtype == torch.float32


def test_gradients_reach_the_rows_that_were_looked_up() -> None:
    model = a_model(configured())
    model(*batch(IDS)).sum().backward()
    for name, bags in IDS.items():
        key = table_key(model.field_names.index(name))
        rows = model.embeddings.embedding_bags[key].weight.grad.abs().sum(dim=1).nonzero().flatten().tolist()
        assert rows == sorted({row for bag in bags for row in bag})


def test_tables_can_wait_for_their_device() -> None:
    model = MaskNet(configured(), TABLES, names_of(TABLES), device="meta")
    assert all(bag.weight.is_meta for bag in model.embeddings.embedding_bags.values())
    assert not any(parameter.is_meta for parameter in model.network.parameters())
