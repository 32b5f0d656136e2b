"""Rivals from elsewhere: torch.compile, and the row norms of Liger-Kernel and quack where they are installed.

Liger-Kernel 0.8: LigerLayerNormFunction, LigerRMSNormFunction and LigerDyTFunction of liger_kernel.ops. quack 0.6:
rmsnorm, and layernorm_fwd, which has no gradient.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

# A norm of x [N, d] with a weight [d], a bias [d] or none, and what else its kind has.
RowNormCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]
EPS = 1e-5


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function by torch.compile for the sizes that it is first called with."""
    torch.compiler.reset()  # or the functions of many cases reach the limit of recompilations
    return torch.compile(function, fullgraph=True, dynamic=False)


def row_norms(kind: str, backward: bool) -> dict[str, RowNormCall | str]:
    """The norm called `kind` from each library, or why it has none."""
    return {"liger": _liger(kind), "quack": _quack(kind, backward)}


def _liger(kind: str) -> RowNormCall | str:
    ops = _imported("liger_kernel.ops")
    if isinstance(ops, str):
        return ops
    if kind == "layer":
        return lambda x, weight, bias, extra: ops.LigerLayerNormFunction.apply(x, weight, bias, EPS)
    if kind == "rms":  # in fp32 throughout, as here; not in place, for its gradient would overwrite the output's
        return lambda x, weight, bias, extra: ops.LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "gemma", False)
    if kind == "dyt":
        return lambda x, weight, bias, extra: ops.LigerDyTFunction.apply(x, extra, weight, bias)
    return f"liger has no {kind}"


def _quack(kind: str, backward: bool) -> RowNormCall | str:
    quack = _imported("quack.rmsnorm")
    if isinstance(quack, str):
        return quack
    if kind == "layer" and backward:
        return "quack's layer norm has no autograd"
    if kind == "layer":
        return lambda x, weight, bias, extra: quack.layernorm_fwd(x, weight, bias, eps=EPS)
    if kind == "rms":
        return lambda x, weight, bias, extra: quack.rmsnorm(x, weight, eps=EPS)
    return f"quack has no {kind}"


def _imported(name: str) -> Any:
    """The module, or in words why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # a library that does not fit this torch may fail in any way
        return f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
