"""int8, bf16 and `mixed` of folded networks of every kind, against the trained one in fp64; scores ignore batches.

Legend: N rows, Z inputs and O outputs of a layer.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from masknet.folding import ServingNetwork, fold
from masknet.folding.blocks import Hidden
from masknet.networks import Network
from masknet.norms import NORMS
from serving.backends import ranges as ranges_module
from serving.backends.base import CPUBackend
from serving.backends.bf16 import HalfNetwork
from serving.backends.bounds import best_bounds, product_error
from serving.backends.fast import fast_network, lacking
from serving.backends.grid import Grid
from serving.backends.int8 import Int8Network
from serving.backends.layers import ContextApart, with_layers
from serving.backends.quantized import QuantizedLinear
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
NAMES: tuple[Fast, ...] = ("int8", "mixed", "bf16")
# Of the deviation of the logits, root mean square: 8 and 9 bits in five layers, some of which divide by a row's size.
MOST_OFF = {"int8": 0.12, "mixed": 0.05, "bf16": 0.06}


def needs(name: Fast) -> None:
    if (lacks := lacking(name)) is not None:
        pytest.skip(f"{name}: {lacks}")


def ranges_of(network: Network) -> Ranges:
    """Of other rows than the tests score, in two calls."""
    observer = Observer(fold(network))
    with torch.no_grad():
        for part in torch.split(embeddings(ROWS, seed=1).flatten(1), ROWS // 2):
            observer(torch.empty(1, 0), part)
    return observer.ranges()


def off(found_N: torch.Tensor, expected_N: torch.Tensor) -> float:
    return float((found_N - expected_N).square().mean().sqrt() / expected_N.std())


def assert_close_and_alone(name: Fast, network: Network) -> None:
    """Whole rows and a context apart, and batches of 1, 7 and 50."""
    ranges = ranges_of(network)
    emb_NFd = embeddings(1000, seed=2)
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
        parts = [split.logits(context_1C, part) for part in torch.split(candidates_NR[:300], size)]
        torch.testing.assert_close(torch.cat(parts), logit_N[:300], rtol=0, atol=2e-6)


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


def test_layers_of_mixed_are_of_bytes_behind_a_relu_alone() -> None:
    needs("mixed")
    network = network_of(SHAPES["parallel"])
    ranges, folded = ranges_of(network), fold(network)
    found = Int8Network(folded, ranges, mixed=True).network
    of_bytes = {name for name, layer in found.named_modules() if isinstance(layer, QuantizedLinear)}
    assert {name.removesuffix(".block") for name in of_bytes} == {
        *(f"body.blocks.{k}.block.second" for k in range(3)),
        *("body.head.0", "body.head.1"),
    }
    emb_ND = embeddings(2000, seed=2).flatten(1)
    with torch.inference_mode():
        expected_N = folded(torch.empty(1, 0), emb_ND)
        errors = [off(fast_network(name, folded, ranges)(torch.empty(1, 0), emb_ND), expected_N) for name in NAMES]
    assert errors[0] > errors[1] > errors[2] > 0


def rows_with_tails(rows: int, width: int, seed: int) -> torch.Tensor:
    """Products of two normal numbers, as masks make them, in columns of several sizes."""
    x_2NZ = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(seed))
    return x_2NZ.prod(0) * torch.linspace(0.5, 2.0, width)


def rounded_product(x_NZ: np.ndarray, weight_OZ: np.ndarray, bound_Z: np.ndarray) -> np.ndarray:
    """W x with x in 255 steps between bounds that are smoothed, and W in as many, in fp64."""
    smooth_Z = np.sqrt(np.maximum(bound_Z, 0.1 * bound_Z.max()) / np.abs(weight_OZ).max(0))
    step_Z = smooth_Z * (bound_Z / smooth_Z).max() / 127
    smoothed_OZ = weight_OZ * smooth_Z
    step_O1 = np.abs(smoothed_OZ).max(1, keepdims=True) / 127
    rounded_OZ = np.rint(smoothed_OZ / step_O1) * step_O1 / smooth_Z
    product_NO: np.ndarray = np.clip(np.rint(x_NZ / step_Z), -128, 127) * step_Z @ rounded_OZ.T
    return product_NO


def test_bounds_are_nearly_the_best_ones() -> None:
    """Of all that a finer search finds by computing products; those of the largest values are a third worse."""
    x_NZ = rows_with_tails(20_000, 24, seed=0)
    weight_OZ = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    range_2Z = torch.stack([x_NZ.amin(0), x_NZ.amax(0)])
    found_2Z = best_bounds(range_2Z, x_NZ, weight_OZ)
    assert bool((found_2Z.abs() <= range_2Z.abs()).all())
    x, weight = x_NZ.double().numpy(), weight_OZ.double().numpy()

    def error(bound_Z: np.ndarray) -> float:
        return float(np.mean((rounded_product(x, weight, bound_Z) - x @ weight.T) ** 2))

    widest_Z, rms_Z = np.abs(x).max(0), np.sqrt(np.mean(x**2, 0))
    cuts = [np.minimum(widest_Z, cut * rms_Z) for cut in (1e9, *range(2, 16, 2))]
    least = min(error(factor * cut_Z) for cut_Z in cuts for factor in np.arange(0.2, 1.01, 0.1))
    chosen = error(found_2Z.abs().amax(0).double().numpy())
    assert chosen < 1.1 * least
    assert chosen < 0.8 * error(widest_Z)
    grid = Grid.of(found_2Z, weight_OZ)
    assert product_error(grid, x_NZ, weight_OZ) / 16 == pytest.approx(chosen, rel=0.05)


def test_bounds_without_tails_stay_where_they_are() -> None:
    x_NZ = torch.rand(1000, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    range_2Z = torch.stack([x_NZ.amin(0), x_NZ.amax(0)])
    assert torch.equal(best_bounds(range_2Z, x_NZ, torch.ones(4, 8)), range_2Z)


def test_an_observer_sees_all_rows_and_keeps_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges_module, "KEPT_ROWS", 20)
    network = fold(network_of(SHAPES["parallel"]))
    observer, emb_ND = Observer(network), embeddings(333, seed=1).flatten(1)
    with torch.no_grad():
        for part in torch.split(emb_ND, 37):
            observer(torch.empty(1, 0), part)
    seen = observer._seen["first"]
    assert torch.equal(seen.range_2Z, torch.stack([emb_ND.amin(0), emb_ND.amax(0)]))
    assert torch.equal(seen.kept_NZ, emb_ND[::32])  # 11 of 333: a stride doubles when there are more than 20
    assert {len(each.kept_NZ) for each in observer._seen.values()} == {11}


def test_bounds_of_all_layers_survive_a_file(tmp_path: Path) -> None:
    found = ranges_of(network_of(SHAPES["parallel"]))
    assert sorted(found) == sorted(
        ["first", "body.head.0", "body.head.1", "body.head.2"]
        + [f"body.blocks.{k}.{layer}" for k in range(3) for layer in ("second", "linear")]
    )
    path = tmp_path / "ranges.safetensors"
    save_ranges(path, found)
    loaded = load_ranges(path)
    assert all(torch.equal(loaded[name], range_2Z) for name, range_2Z in found.items())


def test_embeddings_are_normalized_to_the_same_bits_in_every_batch() -> None:
    """In fp32 the way depends on the number of rows; what is rounded to bytes afterwards would differ by a step."""
    network = with_layers(fold(network_of({"kind": "parallel", "mask": False})), lambda _, layer: layer, _no_first)
    emb_ND = embeddings(500, seed=3).flatten(1)
    with torch.inference_mode():
        whole_ND = network.candidate_norm(emb_ND, Hidden())
        for rows in (1, 7, 50):
            assert torch.equal(network.candidate_norm(emb_ND[:rows], Hidden()), whole_ND[:rows])


def _no_first(network: ServingNetwork) -> ContextApart:
    raise AssertionError("without masks nothing reads the raw embedding")
