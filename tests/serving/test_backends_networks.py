"""int8 and bf16 of folded networks of every kind, against the trained network in fp64; scores do not depend on batches.

Legend: N rows, Z inputs and O outputs of a layer.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from masknet.folding import fold
from masknet.networks import Network
from masknet.norms import NORMS
from serving.backends.base import CPUBackend
from serving.backends.bf16 import HalfNetwork
from serving.backends.fast import fast_network, lacking
from serving.backends.grid import Grid
from serving.backends.int8 import Int8Network, QuantizedLinear
from serving.backends.ranges import Observer, Ranges, load_ranges, save_ranges
from serving.backends.record import Fast
from tests.serving.backends import CONTEXT, ROWS, apart, embeddings, exact, network_of

SHAPES: dict[str, dict[str, object]] = {
    "parallel": {"kind": "parallel", "head": (16, 12)},
    "no head": {"kind": "parallel", "head": ()},
    "elu": {"kind": "parallel", "head": (16,), "activation": "elu"},
    "serial": {"kind": "serial", "head": ()},
    "residual": {"kind": "residual_serial", "head": (), "placement": "peri"},
    "no mask": {"kind": "parallel", "head": (16,), "mask": False},
    "masks alone": {"kind": "parallel", "head": (16,), "feed_forward": False, "hidden_norm": "none"},
    "masks alone, serial": {"kind": "serial", "head": (), "feed_forward": False, "hidden_norm": "none"},
    "conditional": {"kind": "parallel", "head": (16,), "embedding_norm": "conditional"},
}
NAMES: tuple[Fast, ...] = ("int8", "bf16")
# Of the deviation of the logits, root mean square: 8 and 9 bits in five layers, some of which divide by a row's size.
MOST_OFF = {"int8": 0.12, "bf16": 0.06}


def needs(name: Fast) -> None:
    if (lacks := lacking(name)) is not None:
        pytest.skip(f"{name}: {lacks}")


def ranges_of(network: Network) -> Ranges:
    """Of other rows than the tests score, in two calls."""
    observer = Observer(fold(network))
    with torch.no_grad():
        for part in torch.split(embeddings(ROWS, seed=1).flatten(1), ROWS // 2):
            observer(torch.empty(1, 0), part)
    return observer.ranges


def off(found_N: torch.Tensor, expected_N: torch.Tensor) -> float:
    return float((found_N - expected_N).square().mean().sqrt() / expected_N.std())


def assert_close_and_alone(name: Fast, network: Network) -> None:
    """Whole rows and a context apart, and batches of 1, 7 and 50."""
    ranges = ranges_of(network)
    emb_NFd = embeddings(300, seed=2)
    whole = CPUBackend(name, fast_network(name, fold(network), ranges))
    logit_N = whole.logits(torch.empty(1, 0), emb_NFd.flatten(1))
    assert logit_N.dtype == torch.float32
    assert off(logit_N, exact(network, emb_NFd)) < MOST_OFF[name]
    emb_NFd[:, CONTEXT] = emb_NFd[:1, CONTEXT].clone()
    context_1C, candidates_NR = apart(emb_NFd, CONTEXT)
    split = CPUBackend(name, fast_network(name, fold(network, CONTEXT), ranges))
    logit_N = split.logits(context_1C, candidates_NR)
    assert off(logit_N, exact(network, emb_NFd)) < MOST_OFF[name]
    for size in (1, 7, 50):
        parts = [split.logits(context_1C, part) for part in torch.split(candidates_NR, size)]
        torch.testing.assert_close(torch.cat(parts), logit_N, rtol=0, atol=2e-6)


QUICK = ("masks alone",)  # the others take seconds each


@pytest.mark.parametrize(
    "shape", [each if each in QUICK else pytest.param(each, marks=pytest.mark.long) for each in SHAPES]
)
@pytest.mark.parametrize("name", NAMES)
def test_every_shape(name: Fast, shape: str) -> None:
    needs(name)
    assert_close_and_alone(name, network_of(SHAPES[shape], raw=(2,)))


@pytest.mark.long
@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("name", NAMES)
def test_every_norm(name: Fast, norm: str) -> None:
    needs(name)
    slot = {"name": norm, **({"groups": 4} if norm == "evonorm_s0" else {})}
    assert_close_and_alone(name, network_of({**SHAPES["parallel"], "hidden_norm": slot}))


@pytest.mark.long
@pytest.mark.parametrize("norm", sorted(NORMS.keys() - {"none", "evonorm_s0"}))  # which have no residual form
@pytest.mark.parametrize("name", NAMES)
def test_every_norm_of_residual_blocks(name: Fast, norm: str) -> None:
    needs(name)
    assert_close_and_alone(name, network_of({**SHAPES["residual"], "hidden_norm": norm}))


def test_the_context_apart_and_whole_rows_differ_in_no_step_of_int8() -> None:
    needs("int8")
    network = network_of(SHAPES["parallel"])
    ranges = ranges_of(network)
    emb_NFd = embeddings(300, seed=3)
    emb_NFd[:, CONTEXT] = emb_NFd[:1, CONTEXT].clone()
    with torch.inference_mode():
        whole_N = Int8Network(fold(network), ranges)(torch.empty(1, 0), emb_NFd.flatten(1))
        split_N = Int8Network(fold(network, CONTEXT), ranges)(*apart(emb_NFd, CONTEXT))
    apart_N = (whole_N - split_N).abs()
    assert float(apart_N.median()) < 1e-5  # a unit may fall to the next step where sums differ by rounding
    assert off(whole_N, split_N) < 0.02


def test_a_layer_of_int8_is_the_product_of_the_rounded_numbers() -> None:
    needs("int8")
    torch.manual_seed(0)
    x_NZ, weight_OZ, bias_O = torch.randn(50, 30), torch.randn(20, 30), torch.randn(20)
    grid = Grid.of(torch.stack([x_NZ.amin(0), x_NZ.amax(0)]), weight_OZ)
    x, weight, smooth = (each.double().numpy() for each in (x_NZ, weight_OZ, grid.smooth_Z))
    steps = np.clip(np.rint(x / (smooth * grid.scale)) + 128, 0, 255)
    width_O1 = np.abs(weight * smooth).max(1, keepdims=True) / 127
    rounded = np.rint(weight * smooth / width_O1) * width_O1
    expected = (steps - 128) * grid.scale @ rounded.T + bias_O.double().numpy()
    found = QuantizedLinear(weight_OZ, bias_O, grid)(x_NZ)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    masked = QuantizedLinear(weight_OZ, bias_O, grid)(x_NZ, times=found)
    np.testing.assert_allclose(masked.numpy(), expected**2, rtol=1e-4, atol=1e-4)
    exact_NO = x @ weight.T + bias_O.double().numpy()
    assert np.sqrt(np.mean((expected - exact_NO) ** 2)) < 0.02 * exact_NO.std()


def test_bytes_of_a_grid() -> None:
    unsigned = Grid(torch.tensor([1.0, 0.5]), scale=0.1, zero=0)
    x_N2 = torch.tensor([[0.0, 0.0], [0.1, 0.1], [0.26, 0.26], [25.5, 12.75], [99.0, 99.0], [-1.0, -1.0]])
    assert unsigned(x_N2).tolist() == [[0, 0], [1, 2], [3, 5], [255, 255], [255, 255], [0, 0]]
    signed = Grid(torch.tensor([1.0]), scale=0.1, zero=128)
    assert signed(torch.tensor([[0.0], [0.1], [-0.26], [-12.8], [12.7], [-99.0], [99.0]])).flatten().tolist() == [
        *(128, 129, 125, 0, 255, 0, 255)
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_gets_no_score(name: Fast, value: float) -> None:
    needs(name)
    network = network_of(SHAPES["parallel"])
    ranker = fast_network(name, fold(network, CONTEXT), ranges_of(network))
    context_1C, candidates_NR = apart(embeddings(5, seed=2), CONTEXT)
    candidates_NR[3, 0] = value
    with torch.inference_mode():
        logit_N = ranker(context_1C, candidates_NR)
        assert torch.isnan(logit_N).tolist() == [False, False, False, True, False]
        context_1C[0, 0] = value
        assert bool(torch.isnan(ranker(context_1C, candidates_NR)).all())


def test_a_network_is_left_as_it_is() -> None:
    network = network_of(SHAPES["parallel"])
    folded, emb_ND = fold(network), embeddings(20, seed=2).flatten(1)
    with torch.inference_mode():
        before = folded(torch.empty(1, 0), emb_ND)
        for name in NAMES:
            if lacking(name) is None:
                fast_network(name, folded, ranges_of(network))
        assert torch.equal(folded(torch.empty(1, 0), emb_ND), before)
        assert not isinstance(folded, Int8Network | HalfNetwork)


def test_bounds_are_those_of_all_calls_and_survive_a_file(tmp_path: Path) -> None:
    network = network_of(SHAPES["parallel"])
    found = ranges_of(network)
    emb_ND = embeddings(ROWS, seed=1).flatten(1)
    assert torch.equal(found["first"], torch.stack([emb_ND.amin(0), emb_ND.amax(0)]))
    assert sorted(found) == sorted(
        ["first", "body.head.0", "body.head.1", "body.head.2"]
        + [f"body.blocks.{k}.{layer}" for k in range(3) for layer in ("second", "linear")]
    )
    path = tmp_path / "ranges.safetensors"
    save_ranges(path, found)
    loaded = load_ranges(path)
    assert all(torch.equal(loaded[name], range_2Z) for name, range_2Z in found.items())
