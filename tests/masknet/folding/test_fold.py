"""A folded network computes what the trained one computes, over every norm, slot, kind, placement and activation.

Parameters and running statistics are drawn at random, with γ = 0 in one channel, γ < 0 in another and a channel whose
running variance is 0. Legend: N candidates, F fields, d embedding width, C width of the context, R of a candidate.
"""

import copy
from collections.abc import Iterator

import pytest
import torch

from masknet.config import MaskNetConfig
from masknet.folding import ServingNetwork, fold
from masknet.folding.blocks import FoldedBlock
from masknet.folding.packed import PackedLinear
from masknet.networks import build_network
from masknet.norms import NORMS, set_progress
from masknet.norms.affine import AffineOnly
from masknet.norms.batch import PRepBatchNorm
from masknet.norms.rms import RMSNorm

F, DIM, WIDTH, N = 5, 4, 8, 40
CONTEXT = (3, 0)
# fp64 rounds by 1e-16 of terms up to 1e4 (a shift over a small scale), summed by the dozen in five layers
EXACT = 1e-10

VARIANTS: dict[str, list[dict[str, object]]] = {
    "power": [{}, {"group_scaling": 2}],
    "seednorm": [{}, {"heads": 2}],
    "evonorm_s0": [{"groups": 2}],
    "affine": [{}],
}
NORM_SLOTS = [{"name": name, **rest} for name in NORMS for rest in VARIANTS.get(name, [{}])]
PLACEMENTS = ("pre", "post", "peri", "mix")
ACTIVATIONS = ("relu", "elu", "selu")


def title(value: object) -> str:
    return "-".join(f"{v}" for v in value.values()) if isinstance(value, dict) else str(value)


def shapes() -> Iterator[dict[str, object]]:
    yield {"kind": "parallel", "head": (9, 7)}
    yield {"kind": "parallel", "head": ()}
    yield {"kind": "serial", "head": ()}
    for placement in PLACEMENTS:
        yield {"kind": "residual_serial", "head": (), "placement": placement, "depth_scaling": "residual"}


SHAPES = list(shapes())


def randomized(network: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Weights of all signs and sizes, kept small enough for answers that depend on the input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(generator=generator)
            if name.endswith(".weight") and "norm" in name and "aggregate" not in name and "project" not in name:
                parameter[..., 0], parameter[..., 1] = 0.0, -1.5
            elif parameter.dim() > 1:
                parameter.mul_(1.5 / parameter.shape[1] ** 0.5)
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator)
            elif name.endswith(("running_var", "running_power")):
                buffer.uniform_(0.5, 2.0, generator=generator)
                buffer[..., -1] = 0.0
    return network


def a_network(config: dict[str, object], raw: tuple[int, ...] = (), progress: float = 1.0) -> torch.nn.Module:
    base = {"embedding_dim": DIM, "block_width": WIDTH, "blocks": 4, "reduction_ratio": 0.7}
    network = randomized(build_network(MaskNetConfig.model_validate({**base, **config}), F, raw).double())
    set_progress(network, progress)
    return network.eval()


def embeddings(rows: int = N, scale: float = 1.0, seed: int = 1) -> torch.Tensor:
    """[N, F, d], the context's fields alike in all rows; a row whose fields are each constant, and one of zeros."""
    emb = scale * torch.randn(rows, F, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if rows > 2:
        emb[1], emb[2] = emb[1, :, :1].expand(-1, DIM), 0.0
    emb[:, CONTEXT] = emb[0, CONTEXT].clone()
    return emb


def split(emb: torch.Tensor, folded: ServingNetwork) -> tuple[torch.Tensor, torch.Tensor]:
    context, candidates = list(folded.context_fields), list(folded.candidate_fields)
    return emb[:1, context].flatten(1), emb[:, candidates].flatten(1)


@torch.no_grad()
def assert_folds(
    network: torch.nn.Module, context: tuple[int, ...] = CONTEXT, *, scale: float = 1.0, exact: float = EXACT
) -> ServingNetwork:
    emb = embeddings(scale=scale)
    expected = network(emb)
    bound = exact * max(1.0, float(expected.abs().max()))
    assert expected.std() > 1e3 * bound  # its answer depends on its input, far beyond the bound
    folded = fold(network, context)
    torch.testing.assert_close(folded(*split(emb, folded)), expected, rtol=0, atol=bound)
    assert torch.equal(network(emb), expected)  # left as it was
    return folded


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=title)
@pytest.mark.parametrize("norm", NORM_SLOTS, ids=title)
class TestEveryNorm:
    def test_hidden(self, norm: dict[str, object], shape: dict[str, object], activation: str) -> None:
        if shape["kind"] == "residual_serial" and norm["name"] in ("none", "evonorm_s0"):
            shape = {**shape, "placement": "none", "hidden_norm": "none"}  # what the configuration has for it
            norm = {"name": "none"}
        assert_folds(a_network({**shape, "hidden_norm": norm, "activation": activation}))

    def test_embedding(self, norm: dict[str, object], shape: dict[str, object], activation: str) -> None:
        assert_folds(a_network({**shape, "embedding_norm": norm, "activation": activation}))


def scaled_alike(network: torch.nn.Module, scale: float) -> torch.nn.Module:
    """γ of every norm between `scale` and twice that, so that none is 0."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(1, 2, generator=generator).mul_(scale)
    return network


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.01])
@pytest.mark.parametrize("shape", SHAPES, ids=title)
@pytest.mark.parametrize("norm", ["layer", "rms", "l1", "variance_only", "dyt", "bhyt"])
def test_scales_that_pass_the_relu(norm: str, shape: dict[str, object], scale: float) -> None:
    network = scaled_alike(a_network({**shape, "hidden_norm": norm, "embedding_norm": norm}), scale)
    folded = assert_folds(network)
    moved = [block for block in folded.modules() if isinstance(block, FoldedBlock) and block.norm.scale is None]
    passes = scale > 0 or norm not in ("l1", "variance_only")
    if shape["kind"] != "residual_serial":
        assert len(moved) == (4 if passes else 0)  # nothing multiplies by γ any more
    assert folded.candidate_norm.norm.scale is None


SWITCHES: list[dict[str, object]] = [
    {"mask": False},
    {"weight_standardization": True},
    {"feed_forward": False, "hidden_norm": "none"},
    {"blocks": 1},
    {"dropout": 0.5},
]


@pytest.mark.parametrize("norm", ["layer", "batch", "conditional", "dyt"])
@pytest.mark.parametrize("switch", SWITCHES, ids=title)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape["kind"] != "residual_serial"], ids=title)
def test_switches(shape: dict[str, object], switch: dict[str, object], norm: str) -> None:
    assert_folds(a_network({**shape, "hidden_norm": norm, "embedding_norm": norm, **switch}))


@pytest.mark.parametrize("switch", [{"mask": False}, {"weight_standardization": True}], ids=title)
@pytest.mark.parametrize("scaling", ["none", "layernorm_scaling", "residual"])
@pytest.mark.parametrize("placement", [*PLACEMENTS, "none"])
@pytest.mark.parametrize("norm", ["layer", "batch", "seednorm"])
def test_residual_switches(norm: str, placement: str, scaling: str, switch: dict[str, object]) -> None:
    if scaling == "layernorm_scaling" and placement not in ("pre", "mix"):
        scaling = "none"  # the configuration has it for norms before a branch alone
    hidden = "none" if placement == "none" else norm
    shape = {"kind": "residual_serial", "head": (), "placement": placement, "depth_scaling": scaling}
    assert_folds(a_network({**shape, "hidden_norm": hidden, "embedding_norm": norm, **switch}))


@pytest.mark.parametrize("context", [(), (0,), (4, 2, 1), (0, 1, 2, 3)])
@pytest.mark.parametrize("raw", [(), (1,), (0, 3), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("norm", ["layer", "batch", "dyt", "conditional", "seednorm", "power"])
@pytest.mark.parametrize("kind", ["parallel", "serial"])
def test_raw_fields_and_contexts(kind: str, norm: str, raw: tuple[int, ...], context: tuple[int, ...]) -> None:
    head = (5,) if kind == "parallel" else ()
    network = a_network({"kind": kind, "head": head, "embedding_norm": norm}, raw)
    emb = embeddings()
    emb[:, context] = emb[0, context].clone()
    with torch.no_grad():
        folded = fold(network, context)
        torch.testing.assert_close(folded(*split(emb, folded)), network(emb), rtol=0, atol=EXACT)


@pytest.mark.parametrize("scale", [1e-4, 1e3])
@pytest.mark.parametrize("norm", NORM_SLOTS, ids=title)
def test_small_and_large_embeddings(norm: dict[str, object], scale: float) -> None:
    network = a_network({**SHAPES[0], "embedding_norm": norm, "hidden_norm": norm})
    assert_folds(network, scale=scale, exact=1e-13 if scale < 1 else EXACT)


@pytest.mark.parametrize("done", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["parallel", "serial"])
def test_prepbn_is_folded_as_it_is_now(kind: str, done: float) -> None:
    config = {"kind": kind, "head": (), "hidden_norm": "prepbn", "embedding_norm": "prepbn"}
    folded = assert_folds(a_network(config, progress=done))
    assert any(isinstance(module, PRepBatchNorm) for module in folded.modules()) == (done < 0.8)


@pytest.mark.parametrize("hidden", ["layer", "affine"])
def test_what_norm_removal_leaves(hidden: str) -> None:
    affine = {"name": "affine", "centred": True}
    folded = assert_folds(a_network({**SHAPES[0], "hidden_norm": hidden, "embedding_norm": affine}))
    assert not any(isinstance(module, AffineOnly) for module in folded.body.modules())


# A norm that is an affine in evaluation, as (scale, shift) of its state.
def by_power(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return state["weight"] / (state["running_power"] + 1e-5).sqrt(), state["bias"]


def by_variance(state: dict[str, torch.Tensor], prefix: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    scale = state[f"{prefix}weight"] / (state[f"{prefix}running_var"] + 1e-5).sqrt()
    return scale, state[f"{prefix}bias"] - state[f"{prefix}running_mean"] * scale


def by_blend(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    scale, shift = by_variance(state, "batch.")
    return scale + state["slope"], shift


AFFINES = {
    "affine": lambda state: (state["weight"], state["bias"]),
    "batch": by_variance,
    "power_v": by_power,
    "power": by_power,
    "unified": by_power,
    "prepbn": by_blend,
}


@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("name", AFFINES)
def test_norms_by_channel_vanish_into_w(name: str, standardized: bool) -> None:
    config = {"kind": "serial", "head": (), "weight_standardization": standardized, "hidden_norm": name}
    network = a_network(config)
    folded = assert_folds(network, context=())
    for old, new in zip(network.blocks, folded.body.blocks, strict=True):
        scale, shift = AFFINES[name](dict(old.norm.state_dict()))
        weight = old.linear.weight.detach()
        if standardized:
            weight = (weight - weight.mean(1, keepdim=True)) / (weight.std(1, keepdim=True) + 1e-5)
        torch.testing.assert_close(new.linear.weight, scale[:, None] * weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(new.linear.bias, shift, rtol=1e-12, atol=1e-12)
        assert new.norm.trivial


def test_layer_norm_becomes_rms() -> None:
    folded = assert_folds(scaled_alike(a_network(SHAPES[0]), 1.0))
    for block in folded.body.blocks:
        assert isinstance(block.norm.norm, RMSNorm)
        assert block.linear.weight.sum(0).abs().max() < 1e-14


def logits_in(network: torch.nn.Module, folded: ServingNetwork, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    emb = embeddings().to(dtype)
    with torch.no_grad():
        plain, rewritten = copy.deepcopy(network).to(dtype)(emb), copy.deepcopy(folded).to(dtype)(*split(emb, folded))
    assert plain.dtype == rewritten.dtype == dtype
    return plain.double(), rewritten.double()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 0.06)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=title)
@pytest.mark.parametrize("norm", [slot for slot in NORM_SLOTS if slot["name"] != "none"], ids=title)
def test_lower_precision(norm: dict[str, object], shape: dict[str, object], dtype: torch.dtype, bound: float) -> None:
    """Both are off by rounding alone: 2⁻²⁴ or 2⁻⁹ of the largest terms, some tens of them one after the other.

    `bound` is of the largest logit, on networks as they are trained: γ near 1 and β near 0. Beside it the folded one
    may be off by three times what the trained one is, since its products are rounded in other places.
    """
    if shape["kind"] == "residual_serial" and norm["name"] == "evonorm_s0":
        norm = {"name": "layer"}
    network = scaled_alike(a_network({**shape, "hidden_norm": norm, "embedding_norm": norm}), 1.0)
    with torch.no_grad():
        exact = network(embeddings())
    folded = fold(network, CONTEXT)
    plain, rewritten = (float((out - exact).abs().max()) for out in logits_in(network, folded, dtype))
    assert rewritten <= max(3 * plain, bound * float(exact.abs().max()))


def test_the_network_itself_is_left_alone() -> None:
    network = a_network({**SHAPES[2], "hidden_norm": "batch", "weight_standardization": True}).train()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    folded = fold(network)
    assert network.training
    assert not folded.training
    for buffer in folded.buffers():
        buffer.zero_()
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("context", [(5,), (-1,), (1, 1), (0, 1, 2, 3, 4)])
def test_contexts_that_cannot_be(context: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="fields"):
        fold(a_network(SHAPES[0]), context)


@pytest.mark.parametrize(("context", "candidates"), [((1, 7), (3, 12)), ((2, 8), (3, 12)), ((1, 8), (3, 11))])
def test_wrong_widths(context: tuple[int, int], candidates: tuple[int, int]) -> None:
    folded = fold(a_network(SHAPES[0]), CONTEXT)
    with pytest.raises(ValueError, match="must be"):
        folded(torch.zeros(context).double(), torch.zeros(candidates).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_candidates(dtype: torch.dtype) -> None:
    folded = fold(a_network(SHAPES[0]), CONTEXT).to(dtype)
    assert folded(torch.zeros(1, 8, dtype=dtype), torch.zeros(0, 12, dtype=dtype)).shape == (0,)


@pytest.mark.parametrize("shape", SHAPES, ids=title)
@pytest.mark.parametrize("norm", NORM_SLOTS, ids=title)
def test_networks_that_are_in_lower_precision_already(norm: dict[str, object], shape: dict[str, object]) -> None:
    """Folding rounds weights a second time, in layers one after the other: some parts in 2⁹ of the largest logit."""
    hidden = norm
    if shape["kind"] == "residual_serial" and norm["name"] in ("none", "evonorm_s0"):
        hidden = {"name": "layer"}
    network = scaled_alike(a_network({**shape, "hidden_norm": hidden, "embedding_norm": norm}), 1.0).bfloat16()
    emb = embeddings(scale=0.3).bfloat16()
    with torch.no_grad():
        expected = network(emb)
        folded = fold(network, CONTEXT)
        found = folded(*split(emb, folded))
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max().double() <= 0.1 * expected.abs().max().double()


@pytest.mark.parametrize("scale", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("norm", NORM_SLOTS, ids=title)
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=title)
def test_the_explanation_is_of_what_is_left(shape: dict[str, object], norm: dict[str, object], scale: float) -> None:
    network = a_network({**shape, "hidden_norm": norm})
    folded = fold(scaled_alike(network, scale) if scale else network, CONTEXT)  # with a γ of 0, or all of one sign
    for k, block in enumerate(folded.body.blocks, start=1):
        notes = [note for note in folded.explanation.notes if note.place == f"block {k}"]
        kept = [note.text for note in notes if note.outcome == "kept"]
        moved = [note.text for note in notes if note.outcome == "folded" and "past the ReLU" in note.text]
        assert any("row" in text for text in kept) == (block.norm.norm is not None)
        assert any(text.startswith("γ") for text in kept) == (block.norm.scale is not None)
        assert not (moved and block.norm.scale is not None)


def test_the_context_is_multiplied_once() -> None:
    seen: dict[str, list[int]] = {}
    folded = fold(a_network(SHAPES[0]), CONTEXT)
    for name, layer in folded.first.named_modules():
        if not isinstance(layer, PackedLinear):
            continue
        layer.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: list(given[0].shape)}))
    with torch.no_grad():
        folded(*split(embeddings(), folded))
    assert seen == {"context": [1, len(CONTEXT) * DIM], "candidates": [N, (F - len(CONTEXT)) * DIM]}
