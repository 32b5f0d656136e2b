"""The operators under opcheck, torch.compile and torch.export.

Legend: B rows, F fields, d embedding width, D = F·d, h width of a hidden vector.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from masknet.kernels.embedding_norm_mask import embedding_norm_mask, embedding_norm_mask_backward
from masknet.kernels.hidden_norm_act import hidden_norm_act, hidden_norm_act_backward
from masknet.kernels.power_norm_act import power_norm_act, power_norm_act_backward
from tests.masknet.kernels.reference import DEVICE, EPS, KAPPA

B, F, d, h = 5, 3, 4, 8


def random(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> torch.Tensor:
    """A leaf of standard normal entries."""
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad)


def embedding_arguments(kind: str) -> tuple[Any, ...]:
    extra = random(F, 1) if kind == "dyt" else None
    bias = None if kind == "rms" else random(F, d)
    x, mask = random(B, F, d, dtype=torch.bfloat16), random(B, F * d)
    return x, mask, random(F, d), bias, extra, kind, EPS, KAPPA


def hidden_arguments(kind: str) -> tuple[Any, ...]:
    extra = random(2, h) if kind == "seednorm" else None
    bias = random(h) if kind == "layer" else None
    return random(B, h, dtype=torch.bfloat16), random(h), bias, extra, kind, EPS, KAPPA, "relu", 0.1, 7


def detached(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.detach() if isinstance(each, torch.Tensor) else each for each in arguments)


@pytest.mark.parametrize("kind", ["layer", "rms", "dyt"])
def test_embedding_operators(kind: str) -> None:
    arguments = embedding_arguments(kind)
    torch.library.opcheck(embedding_norm_mask, arguments)
    torch.library.opcheck(embedding_norm_mask_backward, (random(B, F * d, grad=False), *detached(arguments)))


@pytest.mark.parametrize("kind", ["layer", "rms", "seednorm"])
def test_hidden_operators(kind: str) -> None:
    arguments = hidden_arguments(kind)
    torch.library.opcheck(hidden_norm_act, arguments)
    torch.library.opcheck(hidden_norm_act_backward, (random(B, h, grad=False), *detached(arguments)))


def test_power_operators() -> None:
    x, vectors = random(B, h, dtype=torch.bfloat16, grad=False), [random(h, grad=False) for _ in range(4)]
    torch.library.opcheck(power_norm_act, (x, *vectors[:3], "relu"))
    torch.library.opcheck(power_norm_act_backward, (x.float(), x, *vectors, "relu"))


class Fused(nn.Module):
    """A hidden norm of a masked and normalized embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(F * d, h)
        self.weight, self.scale = nn.Parameter(torch.rand(F, d)), nn.Parameter(torch.rand(h))
        self.alpha = nn.Parameter(torch.rand(1))

    def forward(self, x_BFd: torch.Tensor, mask_BD: torch.Tensor) -> torch.Tensor:
        """[B, h]."""
        masked_BD = torch.ops.masknet.embedding_norm_mask(x_BFd, mask_BD, self.weight, None, None, "layer", EPS, KAPPA)
        y_Bh = self.linear(masked_BD)
        out: torch.Tensor = torch.ops.masknet.hidden_norm_act(
            y_Bh, self.scale, None, self.alpha, "dyt", EPS, KAPPA, "relu", 0.0, 0
        )
        return out


@pytest.fixture
def network() -> Fused:
    torch.manual_seed(0)
    return Fused().to(DEVICE)


def gradients(network: nn.Module, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    out = function(*inputs)
    return [out, *torch.autograd.grad(out.square().sum(), [*inputs, *network.parameters()])]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_as_one_graph_it_gives_the_same(network: Fused, dynamic: bool) -> None:
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 9):
        inputs = random(rows, F, d), random(rows, F * d)
        for got, expected in zip(
            gradients(network, compiled, *inputs), gradients(network, network, *inputs), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    torch.compiler.reset()


def test_exported_with_a_batch_of_any_size_it_gives_the_same(network: Fused) -> None:
    rows = torch.export.Dim("rows", min=1, max=4096)
    inputs = random(5, F, d, grad=False), random(5, F * d, grad=False)
    program = torch.export.export(network, inputs, dynamic_shapes=({0: rows}, {0: rows}))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.masknet.embedding_norm_mask.default in called
    assert torch.ops.masknet.hidden_norm_act.default in called
    for rows_now in (1, 5, 70):
        inputs = random(rows_now, F, d, grad=False), random(rows_now, F * d, grad=False)
        torch.testing.assert_close(program.module()(*inputs), network(*inputs), rtol=1e-6, atol=1e-6)
