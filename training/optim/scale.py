"""SCALE: stochastic gradients of normalized rows, with a momentum for the last layer only."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn

_SMALL = 1e-8
_LAST_BETA = 0.9
_ADAM_BETAS = (0.9, 0.999)


class Scale(torch.optim.Optimizer):
    """Every row of a linear layer's gradient divided by its root mean square, then a plain step (arXiv 2506.16659).

    W ← (1 − lr · weight_decay) W − lr · g / RMS(g along the inputs), as in OptimAI-Lab/Minimalist_LLM_Pretraining
    (mem_eff_pt/pt_scale/scale_optimizer.py; the paper divides by the L2 norm, which is the root of the width times as
    much). The last layer's gradient is an exponential mean (0.9) before. All that is no linear layer's matrix (biases,
    norms' affines, embeddings of values) goes by AdamW with betas .9 and .999. Tables are no business of it: statistics
    over a million rows that are mostly zero would be wrong.

    Args:
        network: tells which parameters are matrices of linear layers, and by its `logit` which is the last.
        params: what to train; those of the network among them by identity.
        lr: learning rate of all of them.
        weight_decay: decoupled.
    """

    def __init__(self, network: nn.Module, params: list[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        matrices = {id(module.weight) for module in network.modules() if isinstance(module, nn.Linear)}
        last = id(network.get_parameter("logit.weight"))
        kinds: dict[str, list[nn.Parameter]] = {"matrix": [], "last": [], "other": []}
        for parameter in params:
            kind = "last" if id(parameter) == last else "matrix" if id(parameter) in matrices else "other"
            kinds[kind].append(parameter)
        groups = [{"params": members, "kind": kind} for kind, members in kinds.items() if members]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(self._direction(group["kind"], parameter, self.state[parameter]), alpha=group["lr"])
        return loss

    def _direction(self, kind: str, parameter: nn.Parameter, state: dict[str, Any]) -> torch.Tensor:
        assert parameter.grad is not None  # the caller has looked
        gradient = parameter.grad
        if kind == "other":
            return _adam(gradient, state)
        if kind == "last":
            mean = state.setdefault("mean", torch.zeros_like(gradient))
            gradient = mean.lerp_(gradient, 1 - _LAST_BETA)
        return gradient / gradient.square().mean(1, keepdim=True).sqrt().clamp(min=_SMALL)


def _adam(gradient: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    step = state.setdefault("step", torch.zeros(()))
    mean = state.setdefault("mean", torch.zeros_like(gradient))
    square = state.setdefault("square", torch.zeros_like(gradient))
    step += 1
    mean.lerp_(gradient, 1 - _ADAM_BETAS[0])
    square.lerp_(gradient.square(), 1 - _ADAM_BETAS[1])
    mean_bias, square_bias = 1 - _ADAM_BETAS[0] ** float(step), 1 - _ADAM_BETAS[1] ** float(step)
    return (mean / mean_bias) / ((square / square_bias).sqrt() + _SMALL)
