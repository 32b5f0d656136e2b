"""PowerNorm's training step after warm-up: its two kernels alone, and the norm with its running statistics.

Legend: B rows, h channels.
"""

import copy
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Literal

import torch
from torch import nn

from masknet.kernels import dispatch
from masknet.norms.power import PowerNorm
from training.bench.comparing import Case, Rivals
from training.bench.libraries import EPS, compiled
from training.bench.row_kernels import BATCHES, DTYPES, PASSES, normal

H = 400


def power_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """power_norm_act and its backward pass, and PowerNorm with a ReLU."""
    for dtype, B in product(DTYPES[quick], BATCHES[quick]):
        facts = {"pass": PASSES[True], "B": B, "h": H}
        # x → out; then dout, x → dx
        moved = 5 * B * H * dtype.itemsize
        yield Case("power_norm_act", facts, partial(_kernels, device, B, dtype), dtype, moved=moved)
        yield Case("PowerNorm", facts, partial(_norms, device, B, dtype), dtype, host=True)


def formula(
    x: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    dout: torch.Tensor,
    estimate: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """out, Σ x², dx, dweight, dbias, Σ g ⊙ z in torch's operations."""
    wide = x.float()
    z = wide * inverse
    out = torch.relu(z * weight + bias).to(x.dtype)
    dy = torch.where(out > 0, dout.float(), 0.0)
    g, product_Bh = dy * weight, dy * z
    dweight = product_Bh.sum(0)
    dx = ((g - estimate * z) * inverse).to(x.dtype)
    return out, wide.square().sum(0), dx, dweight, dy.sum(0), dweight * weight


def _kernels(device: torch.device, B: int, dtype: torch.dtype) -> Rivals:
    x, dout = (normal(device, dtype, B, H).detach() for _ in range(2))
    inverse, weight, bias, estimate = (torch.rand(H, device=device) + 0.5 for _ in range(4))
    by_torch = compiled(formula)

    def fused() -> tuple[torch.Tensor, ...]:
        forward = dispatch.power_norm_act(x, inverse, weight, bias, "relu")
        return *forward, *dispatch.power_norm_act_backward(dout, x, inverse, weight, bias, estimate, "relu")

    return {
        "eager": lambda: formula(x, inverse, weight, bias, dout, estimate),
        "fused": fused,
        "compile": lambda: by_torch(x, inverse, weight, bias, dout, estimate),
    }


def _norms(device: torch.device, B: int, dtype: torch.dtype) -> Rivals:
    norm = PowerNorm((H,), eps=EPS).to(device).train()
    norm.running_power.fill_(1.0)
    norm.steps.fill_(norm.warmup_steps)
    x = normal(device, dtype, B, H)
    dout, nothing = torch.randn_like(x), nn.Identity()

    def step(norm: PowerNorm, mode: Literal["eager", "fused"]) -> list[torch.Tensor]:
        with dispatch.kernels(mode):
            out = dispatch.norm_act(norm, nn.ReLU(), nothing, x, x)
            return [out.detach(), *torch.autograd.grad(out, [x, norm.weight, norm.bias], dout)]

    return {mode: partial(step, copy.deepcopy(norm), mode) for mode in ("eager", "fused")}
