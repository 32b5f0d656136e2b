"""What the launches of row kernels share: tiles, numbers of programs, room for gradients, checks of arguments."""

import functools
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton

from masknet.kernels.limits import DTYPES
from masknet.kernels.rows import KINDS

PER_ROW = ("dyt", "bhyt")  # kinds whose `extra` is one scalar for a row
PROGRAMS_PER_SM = 4  # of kernels that loop over rows; 16 warps, enough loads in flight to hide the memory's latency
# Registers of a thread of such kernels: what lets 4 programs of 4 warps share a multiprocessor. Left alone, ptxas aims
# at more programs for some of them and spills a few bytes.
MAX_REGISTERS = 128
INTERPRETER_SMS = 1  # few, so that in the interpreter, too, programs loop


class Tile(NamedTuple):
    """The tile of a program, in the names of the kernels' parameters: ROWS × BLOCK_F fields × BLOCK_D columns."""

    ROWS: int
    BLOCK_F: int
    BLOCK_D: int
    num_warps: int


def tile_of(fields: int, width: int, entries: int = 2048) -> Tile:
    """The tile for rows of `fields` × `width`, of about `entries` entries.

    Of the blocks of fields with 64 to 512 entries in a row, that which leaves the fewest fields empty; of equals the
    largest. Below 64 entries of 2 bytes a row's part of a tile would be shorter than a cache line of 128 bytes.
    """
    columns = triton.next_power_of_2(width)
    least = min(triton.next_power_of_2(fields), max(1, 64 // columns))
    most = min(triton.next_power_of_2(fields), max(1, 512 // columns))
    blocks = [2**i for i in range(20) if least <= 2**i <= most]
    block = min(blocks, key=lambda block: (triton.cdiv(fields, block) * block, -block))
    return Tile(max(1, entries // (block * columns)), block, columns, min(16, 4 * max(1, block * columns // entries)))


class RowTile(NamedTuple):
    """The tile of a program, in the names of the kernels' parameters: ROWS × BLOCK_H columns."""

    ROWS: int
    BLOCK_H: int
    num_warps: int


def row_tile_of(width: int, entries: int = 2048) -> RowTile:
    """The tile for rows of `width`, of about `entries` entries; wider rows take more warps, up to 16."""
    block = triton.next_power_of_2(width)
    return RowTile(max(1, entries // block), block, min(16, 4 * max(1, block // entries)))


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETER_SMS


def num_programs(device: torch.device, rows: int, tile_rows: int, columns: int = 1) -> int:
    """How many programs loop over the rows, for each of `columns` blocks of columns that share the device."""
    return min(triton.cdiv(rows, tile_rows), max(1, PROGRAMS_PER_SM * num_sms(device) // columns))


def as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x [B, ...] and the distance of its rows, which may be 0; a copy of x where the entries of a row lie scattered."""
    if x.shape[0] == 0 or not x[0].is_contiguous():
        x = x.contiguous()
    return x, x.stride(0) if x.shape[0] > 1 else x[:1].numel()


def contiguous(*parameters: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The parameters that there are, contiguous."""
    return [None if parameter is None else parameter.contiguous() for parameter in parameters]


def on_device(x: torch.Tensor) -> AbstractContextManager[None]:
    """Launches go to the device of x."""
    return torch.cuda.device_of(x)  # type: ignore[no-untyped-call]


def new_sums(programs: int, parameter: torch.Tensor | None, *shape: int) -> torch.Tensor | None:
    """Room for each program's sum of a parameter's gradient."""
    return None if parameter is None else parameter.new_empty((programs, *shape), dtype=torch.float32)


def total(sums: torch.Tensor | None, parameter: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """A parameter's gradient, the sum over programs and, where the parameter is a scalar of a row, over the row."""
    if sums is None or parameter is None:
        return new_gradient(None, like)
    return sums.sum(0).sum_to_size(parameter.shape).to(parameter.dtype)


def new_gradient(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Room for the gradient of x; without entries where there is no x, for an operator cannot return None."""
    return like.new_empty(0) if x is None else x.new_empty(x.shape)


def register_gradients(forward: Any, backward: Any, *, tensors: int) -> None:
    """Autograd of an operator by another one, and that one's fake.

    Args:
        forward: the operator.
        backward: takes the gradient of its output and then its arguments, and returns a gradient for each of `tensors`.
        tensors: how many of the arguments are tensors or None; they come first.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.options = inputs[tensors:]

    def gradients(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = backward(dout, *ctx.saved_tensors, *ctx.options)
        kept = (None if each is None else grad for each, grad in zip(ctx.saved_tensors, grads, strict=True))
        return *kept, *[None] * len(ctx.options)

    forward.register_autograd(gradients, setup_context=save)
    backward.register_fake(lambda dout, *inputs: tuple(new_gradient(each, dout) for each in inputs[:tensors]))


def check_norm(kind: str, eps: float, extra: torch.Tensor | None) -> None:
    """ValueError for an unknown kind, a missing or needless `extra` ("affine" does with or without) and eps ≤ 0."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    if kind != "affine" and (extra is not None) != (kind in (*PER_ROW, "seednorm")):
        raise ValueError(f"{kind} {'needs extra' if extra is None else 'has no extra'}")
    if eps <= 0:
        raise ValueError(f"eps {eps} is not positive")  # rows beyond the last would be 0 · ∞


def check_activation(activation: str) -> None:
    """ValueError for an activation that kernels do not have."""
    if activation not in ("none", "relu"):
        raise ValueError(f"activation {activation!r} is neither none nor relu")


def check_tensors(**shapes: tuple[torch.Tensor | None, tuple[int, ...]]) -> None:
    """Of each tensor that there is: TypeError for a dtype that kernels do not take, ValueError for another shape."""
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; kernels take float32, bfloat16 and float16")
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
