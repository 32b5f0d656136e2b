"""One process of test_norms_over_ranks: trains small networks on its share of every batch and writes what it saw.

It does so alone if it is the first, then as one of two and as one of three: python ranks_worker.py JOB RANK.
"""

import gc
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from masknet.config import MaskNetConfig
from masknet.networks import build_network

FIELDS, DIM, ROWS, STEPS = 3, 4, 14, 10
SPIKE = 7  # the step with an outlier


def shares(step: int, world: int) -> list[int]:
    """How many of a step's rows each rank has: never equally many, and of three ranks one, in turn, none."""
    sizes, turn = {1: [ROWS], 2: [5, 9], 3: [0, 4, 10]}[world], step % world
    return sizes[turn:] + sizes[:turn]


def train(name: str, parameters: dict[str, Any], rank: int, world: int) -> dict[str, torch.Tensor]:
    """State after every step, and this rank's part of the gradient of the batch's embeddings."""
    torch.manual_seed(0)
    slot = {"name": name, **parameters}
    config = MaskNetConfig(
        embedding_dim=DIM, blocks=2, block_width=6, head=(5,), embedding_norm=slot, hidden_norm=slot, dropout=0.0
    )
    network = build_network(config, FIELDS).double()
    # Buffers as each rank has them, so that differences would stay; small buckets go out during the backward pass.
    trained = DistributedDataParallel(network, broadcast_buffers=False, bucket_cap_mb=0.0005) if world > 1 else network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    random = torch.Generator().manual_seed(1)
    seen = {}
    for step in range(STEPS):
        batch = torch.randn(ROWS, FIELDS, DIM, generator=random, dtype=torch.float64) + 0.3
        weights = torch.rand(ROWS, generator=random, dtype=torch.float64)
        labels = torch.randint(2, (ROWS,), generator=random).double()
        if step == SPIKE:
            batch[:, 0, 0] *= 6
        sizes = shares(step, world)
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for module in network.modules():
            if hasattr(module, "set_progress"):
                module.set_progress(step / STEPS)
        x = batch[mine].requires_grad_()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(trained(x), labels[mine], reduction="none")
        optimizer.zero_grad()
        (world * weights[mine] * losses).sum().backward()
        optimizer.step()
        assert x.grad is not None
        seen[f"{step} input"] = x.grad / world
        seen |= {f"{step} {key}": value.clone() for key, value in network.state_dict().items()}
    return seen


def main(job: dict[str, Any], rank: int) -> None:
    """Train every one of `cases` in every number of processes; OUT/WORLD-RANK.safetensors has "CASE|STEP KEY"."""
    torch.set_num_threads(1)
    for world in (1, 2, 3):
        if rank >= world:
            continue
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{job['out']}/{world}", rank=rank, world_size=world)
        results = {}
        for case, (name, parameters) in job["cases"].items():
            seen = train(name, parameters, rank, world)
            results |= {f"{case}|{key}": value for key, value in seen.items()}
        save_file(results, Path(job["out"]) / f"{world}-{rank}.safetensors")
        if world > 1:
            dist.destroy_process_group()
            gc.collect()  # a thread of the group that is left when the interpreter ends may abort it


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)  # torch 2.13: no other spelling yet
    main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))
