"""Calls of the operators whose kernels are compiled ahead of time: every kind, forward and backward."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

EMBEDDING_KINDS = ("layer", "rms", "l1", "dyt", "bhyt", "affine", "variance_only")
HIDDEN_KINDS = (*EMBEDDING_KINDS, "seednorm")
BLOCK_KINDS = ("none", "rms", "l1")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FIELDS, BLOCKS = 39, 3


@dataclass(frozen=True)
class Case:
    """A call of an operator, and what tells it from the operator's others."""

    op: str
    labels: dict[str, Any]
    call: Callable[[], Any]


def _case(op: str, call: Callable[..., Any], module: str = "", **labels: Any) -> Case:
    importlib.import_module(f"masknet.kernels.{module or op}")  # registers the operator
    return Case(op, {key: str(value) for key, value in labels.items()}, partial(call, **labels))


def _new(*shape: int, dtype: torch.dtype = FP32, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=grad)


def _embedding(kind: str, width: int, dtype: torch.dtype) -> None:
    x, mask = (_new(4096, *shape, dtype=dtype, grad=True) for shape in ((FIELDS, width), (FIELDS * width,)))
    weight, bias = (_new(FIELDS, width, grad=True) for _ in range(2))
    shape = {"dyt": (FIELDS, 1), "bhyt": (FIELDS, 1), "affine": (FIELDS, width)}.get(kind)
    extra = _new(*shape, grad=True) if shape else None
    out = torch.ops.masknet.embedding_norm_mask(x, mask, weight, bias, extra, kind, 1e-5, 10.0)
    out.backward(torch.empty_like(out))


def embedding_cases(thorough: bool) -> Iterator[Case]:
    """embedding_norm_mask and its backward."""
    short = ((16, BF16), (64, FP32))
    full = tuple(product((8, 10, 16, 64), (FP32, BF16, FP16)))
    for kind, (width, dtype) in product(EMBEDDING_KINDS, full if thorough else short):
        yield _case("embedding_norm_mask", _embedding, kind=kind, width=width, dtype=dtype)


def _hidden(kind: str, width: int, dtype: torch.dtype, dropout: float) -> None:
    x, weight = _new(4096, width, dtype=dtype, grad=True), _new(width, grad=True)
    bias = None if kind == "seednorm" else _new(width, grad=True)
    shape = {"dyt": (1,), "bhyt": (1,), "affine": (width,), "seednorm": (2, width)}.get(kind)
    extra = _new(*shape, grad=True) if shape else None
    out = torch.ops.masknet.hidden_norm_act(x, weight, bias, extra, kind, 1e-5, 10.0, "relu", dropout, 1)
    out.backward(torch.empty_like(out))


def hidden_cases(thorough: bool) -> Iterator[Case]:
    """hidden_norm_act and its backward, with dropout and without."""
    short = ((400, BF16, 0.1), (512, FP32, 0.0))
    full = tuple(product((200, 400, 512, 1000), (FP32, BF16, FP16), (0.1,)))
    for kind, (width, dtype, dropout) in product(HIDDEN_KINDS, full if thorough else short):
        yield _case("hidden_norm_act", _hidden, kind=kind, width=width, dtype=dtype, dropout=dropout)


def _power(width: int, dtype: torch.dtype) -> None:
    x, dy = (_new(4096, width, dtype=dtype) for _ in range(2))
    inverse, weight, bias, estimate = (_new(width) for _ in range(4))
    torch.ops.masknet.power_norm_act(x, inverse, weight, bias, "relu")
    torch.ops.masknet.power_norm_act_backward(dy, x, inverse, weight, bias, estimate, "relu")


def power_cases(thorough: bool) -> Iterator[Case]:
    """power_norm_act and power_norm_act_backward."""
    short = ((400, BF16), (512, FP32), (400, FP32))
    for width, dtype in product((200, 400, 512, 1000), (FP32, BF16, FP16)) if thorough else short:
        yield _case("power_norm_act", _power, width=width, dtype=dtype)


def _project(rows: int, width: int, dtype: torch.dtype, precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    hidden, weight = _new(rows, BLOCKS * 400, dtype=dtype), _new(BLOCKS, width, 400, dtype=dtype)
    torch.ops.masknet.mask_project(hidden, weight, _new(BLOCKS, width), _new(rows, width, dtype=dtype))


def project_cases(thorough: bool) -> Iterator[Case]:
    """mask_project for one, some and many candidates, with fp32 operands in both precisions."""
    types = ((BF16, "highest"), (FP32, "highest"), (FP32, "high"), *([(FP16, "highest")] if thorough else []))
    for i, (rows, (dtype, precision)) in enumerate(product((1, 500, 4096), types)):
        for width in (390, 624) if thorough else ((390, 624)[i % 2],):
            yield _case(
                "mask_project", _project, "maskblock_gemm", rows=rows, width=width, dtype=dtype, precision=precision
            )


def _block(kind: str, rows: int, width: int, dtype: torch.dtype, precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    masked, weight = _new(rows, BLOCKS, 624, dtype=dtype), _new(BLOCKS, width, 624, dtype=dtype)
    vectors = [_new(BLOCKS, width) for _ in range(3)]
    torch.ops.masknet.block_gemm(masked, weight, *vectors, kind, 1e-5, "relu")


def block_cases(thorough: bool) -> Iterator[Case]:
    """block_gemm for some and many candidates, with fp32 operands in both precisions."""
    types = ((BF16, "highest"), (FP32, "highest"), (FP32, "high"))
    full = product(BLOCK_KINDS, (500, 4096), (64, 200, 400, 512), types)
    short = (
        (kind, rows, width, (BF16, "highest") if i % 3 else types[1 + i // 3 % 2])
        for i, (kind, (rows, width)) in enumerate(product(BLOCK_KINDS, ((500, 400), (4096, 512))))
    )
    for kind, rows, width, (dtype, precision) in full if thorough else short:
        yield _case(
            "block_gemm",
            _block,
            "maskblock_gemm",
            kind=kind,
            rows=rows,
            width=width,
            dtype=dtype,
            precision=precision,
        )


CASES = {
    "embedding_norm_mask": embedding_cases,
    "hidden_norm_act": hidden_cases,
    "power_norm_act": power_cases,
    "mask_project": project_cases,
    "block_gemm": block_cases,
}
