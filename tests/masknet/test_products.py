"""Training on a CPU: products by oneDNN and ReLUs by their bits, against fp64 and against PyTorch's autocast.

Legend: B rows, F fields, d embedding width, i inputs, o outputs.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional

from masknet.config import MaskNetConfig
from masknet.kernels import dispatch, onednn, products
from masknet.kernels.products import trained_on_cpu
from masknet.networks import build_network
from masknet.norms import NORMS, set_progress

B, F, D_FIELD = 1024, 5, 8
KINDS = [
    {"kind": "parallel", "blocks": 3, "head": (24, 12)},
    {"kind": "serial", "blocks": 3, "head": ()},
    {"kind": "residual_serial", "blocks": 3, "head": ()},
    {"kind": "parallel", "blocks": 2, "head": (24,), "weight_standardization": True},
    {"kind": "parallel", "blocks": 2, "head": (24,), "mask": False},
]
HIDDEN = [name for name in NORMS if name != "affine"]
Found = dict[str, torch.Tensor]


def network_of(shape: dict[str, object], norm: str = "layer", embedding_norm: str = "layer") -> nn.Module:
    torch.manual_seed(1)
    if shape["kind"] == "residual_serial" and norm == "none":
        shape = {**shape, "placement": "none"}
    config = MaskNetConfig.model_validate(
        {"embedding_dim": D_FIELD, "block_width": 32, "hidden_norm": norm, "embedding_norm": embedding_norm, **shape}
    )
    network = build_network(config, F)
    with torch.no_grad():  # affines that are not neutral
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    set_progress(network, 0.5)
    return network


def gradients(network: nn.Module, dtype: torch.dtype = torch.float32) -> Found:
    """Logits, and gradients of a weighted sum of them, by name, in fp64."""
    torch.manual_seed(2)
    emb_BFd = torch.randn(B, F, D_FIELD).to(dtype).requires_grad_()
    weight_B = torch.randn(B).to(dtype)
    own = copy.deepcopy(network).to(dtype)
    logit_B = own(emb_BFd)
    torch.autograd.backward((logit_B.to(dtype) * weight_B).sum())
    parts = {"logit": logit_B, "embedding": emb_BFd.grad, **{name: p.grad for name, p in own.named_parameters()}}
    return {name: part.detach().double() for name, part in parts.items() if part is not None}


def apply(function: Any, *arguments: Any) -> torch.Tensor:
    out: torch.Tensor = function.apply(*arguments)
    return out


def errors(found: Found, truth: Found) -> dict[str, float]:
    assert found.keys() == truth.keys()
    return {name: float((found[name] - part).norm() / (part.norm() + 1e-12)) for name, part in truth.items()}


def autocast(network: nn.Module) -> Found:
    with torch.autocast("cpu", torch.bfloat16):
        return gradients(network)


def ours(network: nn.Module, dtype: torch.dtype) -> Found:
    with trained_on_cpu(dtype):
        return gradients(network)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("i", "o"), [(5, 3), (3, 5)])
def test_gradients_of_a_product(i: int, o: int, bias: bool) -> None:
    parts = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, i), (o, i), (o,))]
    x_Bi, weight_oi, bias_o = parts

    def product(*parts: torch.Tensor) -> torch.Tensor:
        return apply(onednn.Product, *parts, *([] if bias else [None]))

    assert gradcheck(product, (x_Bi, weight_oi, bias_o) if bias else (x_Bi, weight_oi))


@pytest.mark.parametrize("shape", KINDS, ids=lambda shape: "-".join(map(str, shape.values())))
def test_fp32_is_as_exact_as_pytorchs(shape: dict[str, object]) -> None:
    """Both round; oneDNN sums in another order, so that either may be nearer to the truth."""
    network = network_of(shape)
    truth = gradients(network, torch.float64)
    eager, found = errors(gradients(network), truth), errors(ours(network, torch.float32), truth)
    for name, error in found.items():
        assert error <= 3 * eager[name] + 1e-6, (name, error, eager[name])


@pytest.mark.parametrize("shape", KINDS, ids=lambda shape: "-".join(map(str, shape.values())))
def test_bf16_is_as_exact_as_autocast(shape: dict[str, object]) -> None:
    network = network_of(shape)
    compare_with_autocast(network)


@pytest.mark.parametrize("norm", HIDDEN)
def test_every_hidden_norm_in_bf16(norm: str) -> None:
    compare_with_autocast(network_of(KINDS[0], norm))


@pytest.mark.parametrize("norm", [name for name in NORMS if name != "evonorm_s0"])
def test_every_embedding_norm_in_bf16(norm: str) -> None:
    compare_with_autocast(network_of(KINDS[0], "layer", norm))


def compare_with_autocast(network: nn.Module) -> None:
    """Logits and all gradients together have at most twice autocast's error.

    One gradient may have more, where bf16 rounds a ReLU's input to the other side of 0 and a whole term comes or goes;
    that of a single number, in which terms cancel, does not count.
    """
    truth = gradients(network, torch.float64)
    eager, found = errors(autocast(network), truth), errors(ours(network, torch.bfloat16), truth)
    assert 1e-5 < found["logit"] <= 2 * eager["logit"]  # bf16 indeed, and no worse
    parts = [name for name, part in truth.items() if part.numel() > 1]
    assert math.hypot(*(found[name] for name in parts)) <= 2 * math.hypot(*(eager[name] for name in parts))
    for name in parts:
        assert found[name] <= 4 * eager[name] + 0.02, (name, found[name], eager[name])


def test_the_narrow_relu_is_the_relu() -> None:
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([0.0, -0.0, inf, -inf, nan, -nan, 1e-38, -1e-38, 3e38, -3e38], dtype=torch.bfloat16)
    x = torch.cat([special, torch.randn(1000).bfloat16()])
    theirs, mine = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = functional.relu(theirs * 1)
    found = apply(onednn.NarrowRelu, mine * 1)
    assert found[4:6].isnan().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    grad = torch.randn(len(x)).bfloat16()
    torch.autograd.backward([expected, found], [grad, grad])
    sound = ~x.isnan()
    assert mine.grad is not None
    assert theirs.grad is not None
    assert torch.equal(mine.grad[sound], theirs.grad[sound])


def test_nan_in_a_weight_reaches_the_logits() -> None:
    network = network_of(KINDS[0])
    with torch.no_grad():
        network.get_parameter("blocks.1.mask.aggregate.weight")[0, 0] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        assert ours(network, dtype)["logit"].isnan().all()


@pytest.fixture
def eager() -> Iterator[None]:
    with dispatch.kernels("eager"):
        yield


@pytest.mark.usefixtures("eager")
def test_eager_is_autocast() -> None:
    network = network_of(KINDS[0])
    expected, found = autocast(network), ours(network, torch.bfloat16)
    assert all(torch.equal(found[name], part) for name, part in expected.items())


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_in_fp32_under_autocast_too(kind: dict[str, Any]) -> None:
    network = network_of(kind)
    logit_B = ours(network, torch.bfloat16)["logit"]
    assert not torch.equal(logit_B, logit_B.bfloat16().double())


def test_outside_nothing_is_changed() -> None:
    """Serving computes what it did: after a training, and after one that failed."""
    x_Bi, layer = torch.randn(64, 16), products.Linear(16, 8)
    expected = functional.linear(x_Bi, layer.weight, layer.bias)

    def failing() -> None:
        with trained_on_cpu(torch.bfloat16):
            assert layer(x_Bi.bfloat16()).dtype == torch.bfloat16
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert torch.equal(layer(x_Bi), expected)
    assert products.narrowed(x_Bi) is x_Bi
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_switch_is_not_used_where_it_is_inexact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors whose bf16 or tf32 units it would permit: then products are MKL's."""
    left, right = torch.randn(64, 48), torch.randn(48, 32)
    expected = left @ right
    seen: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", seen.append)
    monkeypatch.setattr(onednn, "_switch_is_exact", lambda: False)
    assert torch.equal(onednn._matmul(left, right), expected)
    assert seen == []
    monkeypatch.setattr(onednn, "_switch_is_exact", lambda: True)
    onednn._matmul(left, right)
    assert seen == ["medium", "highest"]
