"""Fused or eager: the one place that decides, and does either.

`MASKNET_KERNELS=auto` (the default) takes the Triton kernels on CUDA for what they can do, and torch's operations for
the rest; `eager` takes torch's everywhere; `fused` is an error where an operation that has a kernel meets a machine or
device on which none can run (no CUDA, no Triton), so that nobody measures the wrong path unawares. What was taken, and
why, is logged at debug level, once for each case.
"""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import environ
from typing import Any, Literal

import torch
from torch import nn

from masknet.kernels.limits import DTYPES, WIDEST_FIELD, WIDEST_GEMM, WIDEST_HIDDEN
from masknet.kernels.modes import KernelsError, Mode, mode_of
from masknet.norms.base import Formula, Norm

log = logging.getLogger(__name__)
_INTERPRETED = environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter, for tests without a GPU
_TRITON = importlib.util.find_spec("triton") is not None
_RUNS = _TRITON and (_INTERPRETED or torch.cuda.is_available())
if _RUNS:
    from masknet.kernels import embedding_norm_mask as _embedding
    from masknet.kernels import hidden_norm_act as _hidden
    from masknet.kernels import maskblock_gemm as _gemm
    from masknet.kernels import power_norm_act as _power

# Rows for which the GEMMs with epilogues are faster than cuBLAS with `hidden_norm_act`, by the benchmark
# (`masknet bench kernels`) on the GPUs that it has run on: (compute capability, dtype) → least and most rows.
MEASURED_GEMMS: dict[tuple[tuple[int, int], torch.dtype], tuple[int, int]] = {
    ((9, 0), torch.bfloat16): (1, 64),
    ((9, 0), torch.float16): (1, 64),
}
# Most rows for which one GEMM of cuBLAS for all blocks is faster than one for each: on an H100, 500 rows of bf16 take
# 49 microseconds against 77, 2,048 take 86 against 110, 8,192 take 244 against 213. On a CPU it is slower from 500 on.
MOST_BATCHED = 2048
Together = Literal["kernels", "batched"]
_NOTHING = nn.Identity()
_said: set[tuple[object, ...]] = set()


_mode: Mode = mode_of(environ.get("MASKNET_KERNELS", "auto"))


@contextmanager
def kernels(mode: Mode) -> Iterator[None]:
    """`MASKNET_KERNELS` for a while, in this process."""
    global _mode
    before, _mode = _mode, mode_of(mode)
    try:
        yield
    finally:
        _mode = before


def is_eager() -> bool:
    """Whether only torch's own operations are wanted."""
    return _mode == "eager"


def takes_kernel(operation: str, x: torch.Tensor, widest: int, norm: Norm | None = None) -> bool:
    """Whether `operation` goes to its kernel for x, with rows along its last axis, and for what is left of `norm`.

    Raises:
        KernelsError: the mode is `fused` and no kernel can run on this machine or device.
    """
    if not _RUNS and _mode != "fused" and (torch.compiler.is_compiling() or not log.isEnabledFor(logging.DEBUG)):
        return False  # the usual case on a CPU, where a request's time is counted in microseconds
    reason = _reason_for_eager(x, widest)
    if not reason and norm is not None and not norm.has_formula:
        reason = "the norm has no kernel"
    _say(operation, norm, x, reason)
    return not reason


def _say(operation: str, norm: Norm | None, x: torch.Tensor, reason: str) -> None:
    """Once for each case; compilers do not follow logging."""
    if torch.compiler.is_compiling() or not log.isEnabledFor(logging.DEBUG):
        return
    what = operation if norm is None else f"{operation} of {type(norm).__name__}"
    case = (what, reason, x.device.type, x.dtype, x.shape[-1])
    if case in _said:
        return
    _said.add(case)
    path = f"eager, {reason}" if reason else "fused"
    log.debug("%s, %s, %s, rows of %d: %s", what, x.device.type, x.dtype, x.shape[-1], path)


def _reason_for_eager(x: torch.Tensor, widest: int) -> str:
    if _mode == "eager":
        return "as MASKNET_KERNELS says"
    on_device = x.device.type == "cuda" or _INTERPRETED
    if not (_RUNS and on_device):
        cannot = f"kernels run on CUDA, not on {x.device.type}" if _TRITON else "Triton is not installed"
        if _mode == "fused":
            raise KernelsError(f"MASKNET_KERNELS=fused: {cannot}")
        return cannot
    if _mode == "auto" and x.device.type != "cuda":
        return "Triton's interpreter is for tests"
    if x.dtype not in DTYPES:
        return f"there is no kernel for {x.dtype}"
    return f"rows are wider than {widest}" if x.shape[-1] > widest else ""


@dataclass(frozen=True)
class PendingNorm:
    """LN_EMB of an embedding [B, F, d], to be computed together with the product with a mask."""

    formula: Formula
    eps: float
    emb_BFd: torch.Tensor


def normed_embedding(norm: Norm, emb_BFd: torch.Tensor, raw_BD: torch.Tensor) -> torch.Tensor | PendingNorm:
    """LN_EMB [B, D], at once or with the products that it goes into."""
    if takes_kernel("embedding_norm_mask", emb_BFd, WIDEST_FIELD, norm):
        return PendingNorm(norm.formula(emb_BFd), norm.eps, emb_BFd)
    normed_BFd: torch.Tensor = norm(emb_BFd, instance=raw_BD)
    return normed_BFd.flatten(1).to(raw_BD.dtype)


def masked(mask: torch.Tensor, x: torch.Tensor | PendingNorm) -> torch.Tensor:
    """m ⊙ x [B, z] for a mask [B, z] or a scalar of 1."""
    if isinstance(x, torch.Tensor):
        return mask * x
    formula, emb_BFd = x.formula, x.emb_BFd
    mask_BD = mask.expand(emb_BFd.shape[0], emb_BFd.shape[1] * emb_BFd.shape[2]) if mask.dim() == 0 else mask
    out_BD: torch.Tensor = _embedding.embedding_norm_mask(
        emb_BFd, mask_BD, formula.weight, formula.bias, formula.extra, formula.kind, x.eps, formula.constant
    )
    return out_BD


def norm_act(
    norm: Norm, activation: nn.Module, dropout: nn.Module, x_Bh: torch.Tensor, raw_BD: torch.Tensor
) -> torch.Tensor:
    """dropout(activation(norm(x))) of a hidden vector [B, h]."""
    fused = _fused_norm_act(norm, activation, dropout, x_Bh)
    if fused is not None:
        return fused
    out_Bh: torch.Tensor = dropout(activation(norm(x_Bh, instance=raw_BD)))
    return out_Bh


def normed(norm: Norm, x_Bh: torch.Tensor, raw_BD: torch.Tensor) -> torch.Tensor:
    """norm(x) of a hidden vector [B, h]."""
    return norm_act(norm, _NOTHING, _NOTHING, x_Bh, raw_BD)


def _fused_norm_act(norm: Norm, activation: nn.Module, dropout: nn.Module, x_Bh: torch.Tensor) -> torch.Tensor | None:
    """With the activation inside where it is a ReLU, and plain dropout where its seed can be drawn."""
    inside = isinstance(activation, nn.ReLU | nn.Identity)
    name = "relu" if isinstance(activation, nn.ReLU) else "none"
    rate = 0.0
    if norm.has_fused_step and takes_kernel("power_norm_act", x_Bh, WIDEST_HIDDEN):
        out_Bh = norm.fused_step(x_Bh, name)
    elif takes_kernel("hidden_norm_act", x_Bh, WIDEST_HIDDEN, norm):
        if inside and type(dropout) is nn.Dropout and dropout.training and not torch.compiler.is_compiling():
            rate = dropout.p
        out_Bh = hidden_norm_act(norm.formula(x_Bh), x_Bh, norm.eps, name, rate)
    else:
        return None
    out_Bh = out_Bh if inside else activation(out_Bh)
    return out_Bh if rate else dropout(out_Bh)


def hidden_norm_act(
    formula: Formula, x_Bh: torch.Tensor, eps: float, activation: str, dropout: float = 0.0
) -> torch.Tensor:
    """The kernel for a hidden vector, with "none" or "relu" behind it."""
    seed = int(torch.randint(2**31, ())) if dropout else 0  # on the host: drawing it stops no stream
    weight, bias, extra = formula.weight, formula.bias, formula.extra
    out_Bh: torch.Tensor = _hidden.hidden_norm_act(
        x_Bh, weight, bias, extra, formula.kind, eps, formula.constant, activation, dropout, seed
    )
    return out_Bh


def blocks_together(x_ND: torch.Tensor, width: int) -> Together | None:
    """How like blocks of `width` are computed at once: by `mask_project` and `block_gemm`, by batched GEMMs, or not."""
    if takes_gemms(x_ND, width):
        return "kernels"
    return "batched" if x_ND.is_cuda and _mode == "auto" and x_ND.shape[0] <= MOST_BATCHED else None


def takes_gemms(x_ND: torch.Tensor, width: int) -> bool:
    """Whether the products of blocks of `width` go to `mask_project` and `block_gemm`."""
    reason = _reason_for_eager(x_ND, x_ND.shape[-1])
    if not reason and width > WIDEST_GEMM:
        reason = f"blocks are wider than {WIDEST_GEMM}"
    if not reason and _mode == "auto":
        case = torch.cuda.get_device_capability(x_ND.device), x_ND.dtype
        least, most = MEASURED_GEMMS.get(case, (0, -1))
        if not least <= x_ND.shape[0] <= most:
            reason = "cuBLAS was not measured to be slower"
    _say("mask_project and block_gemm", None, x_ND, reason)
    return not reason


def mask_project(*arguments: Any) -> torch.Tensor:
    """`masknet.kernels.maskblock_gemm.mask_project`."""
    out: torch.Tensor = _gemm.mask_project(*arguments)
    return out


def block_gemm(*arguments: Any) -> torch.Tensor:
    """`masknet.kernels.maskblock_gemm.block_gemm`."""
    out: torch.Tensor = _gemm.block_gemm(*arguments)
    return out


def power_norm_act(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`masknet.kernels.power_norm_act.power_norm_act`."""
    out: tuple[torch.Tensor, torch.Tensor] = _power.power_norm_act(*arguments)
    return out


def power_norm_act_backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """`masknet.kernels.power_norm_act.power_norm_act_backward`."""
    out: tuple[torch.Tensor, ...] = _power.power_norm_act_backward(*arguments)
    return out
