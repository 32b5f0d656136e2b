"""Processes: one alone is a world of size one, several come from torchrun; everything else is the same code."""

import gc
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from training.errors import PeerLost, Stopped

T = TypeVar("T")

# The longest that a process waits for another one: at the end, for rank 0 to write the bundle and to send it to MLflow.
_PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among its equals."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes and reports."""
        return self.rank == 0


@contextmanager
def join_world() -> Iterator[World]:
    """Join torchrun's processes (or be alone) for the length of a block: gloo on CPUs, NCCL on GPUs.

    Processes that succeed, or were stopped, leave together: torchrun ends all others when a stopped one exits, and the
    machine that is done first may be the one where the others meet. A process that fails leaves at once.

    Raises:
        PeerLost: another process has ended, or does not answer.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=_PATIENCE)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        yield World(rank=rank, size=size, device=device)
        _wait_for_all(device)
    except Stopped as error:
        _wait_for_all(device)
        _forget_locals(error)
        raise
    except Exception as error:
        _forget_locals(error)
        if (told := _told_of_peer(error)) is not None:
            raise PeerLost(f"another process of this training has ended or does not answer: {told}") from None
        raise
    finally:
        if dist.is_initialized():
            leave_group()


def leave_group() -> None:
    """Leave the processes' group, and see its threads end.

    They end with the group's last reference, and models hold references in cycles. A thread that is left, and that lets
    go of a tensor when the interpreter is ending, aborts the process: it asks for the GIL in a destructor, and instead
    of getting it is told to exit.
    """
    dist.destroy_process_group()
    gc.collect()


def _wait_for_all(device: torch.device) -> None:
    sum_over_ranks(torch.zeros(1, device=device)).item()


def _forget_locals(error: BaseException | None) -> None:
    """Drop the local variables of the functions that an error has ended, a model in its process group among them."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _told_of_peer(error: Exception) -> str | None:
    """What gloo or NCCL has to say of another process, if that is what an error is about."""
    if isinstance(error, dist.DistError):
        return str(error).partition("\n")[0]
    # gloo's errors are plain ones: "[…/gloo/transport/tcp/pair.cc:553] Connection closed by peer […]:35718. This is …"
    found = re.search(r"\[\S*/gloo/\S*\] (.+?)(\. |\n|$)", str(error)) if isinstance(error, RuntimeError) else None
    return found[1] if found else None


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Elementwise sum over all processes, in place."""
    dist.all_reduce(values)
    return values


def from_rank_0(value: T | None) -> T | None:
    """Rank 0's value, on every rank; what other ranks give does not count."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def concat_over_ranks(local_N: torch.Tensor) -> torch.Tensor:
    """The ranks' one-dimensional tensors, of any lengths, one after the other; the same on every rank."""
    length = torch.tensor([len(local_N)], device=local_N.device)
    lengths = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    longest = max(int(n) for n in lengths)
    padded = torch.nn.functional.pad(local_N, (0, longest - len(local_N)))
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])
