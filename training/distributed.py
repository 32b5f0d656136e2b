"""Processes: one alone is a world of size one, several come from torchrun; everything else is the same code."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore


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
    """Join torchrun's processes (or be alone) for the length of a block: gloo on CPUs, NCCL on GPUs."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield World(rank=rank, size=size, device=device)
    finally:
        dist.destroy_process_group()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Elementwise sum over all processes, in place."""
    dist.all_reduce(values)
    return values


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
