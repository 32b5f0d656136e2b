"""One process of test_sharding_independence: trains on its share of every batch, and writes what came of it.

Two processes also write a checkpoint in the middle, which all go on from:
python -m tests.training.sharding_worker JOB RANK WORLD.
"""

import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import DefaultLoadPlanner

from tests.training.placed import TABLES, batches, configured, placed
from training.distributed import World, leave_group, sum_over_ranks
from training.embeddings.sharding import gather_tables
from training.optim.optimizers import build_optimizer, prepare_for_load
from training.quiet import quiet_libraries

STEPS, MIDDLE = 16, 8
WAIT = timedelta(minutes=10)  # of ranks for each other, on a machine with fewer cores than ranks
WRITERS = 2  # as many processes write the checkpoints


def train(sections: dict[str, Any], world: World, checkpoint: Path, resumes: bool) -> dict[str, torch.Tensor]:
    """Mean losses [steps], and the weights at the end: the network's, and the tables' under "table NAME"."""
    config = configured(**sections)
    dmp, model = placed(config, world)
    optimizer = build_optimizer(dmp, config, model.network)
    if resumes:
        prepare_for_load(optimizer)
        state = {"model": dmp.state_dict(), "optimizer": optimizer.state_dict()}
        dcp.load(state, checkpoint_id=checkpoint, planner=DefaultLoadPlanner(flatten_sharded_tensors=False))
        dmp.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    losses = []
    for step, batch in enumerate(batches(STEPS, world.rank, world.size)):
        if resumes and step < MIDDLE:
            continue
        optimizer.zero_grad()
        loss, _ = dmp(batch)
        loss.backward()
        optimizer.step()
        losses.append(sum_over_ranks(loss.detach()) / world.size)
        if step + 1 == MIDDLE and world.size == WRITERS:
            dcp.save({"model": dmp.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=checkpoint)
    tables = gather_tables(dmp, [table.name for table in TABLES])
    return {"losses": torch.stack(losses), **model.dense_state(), **{f"table {k}": v for k, v in tables.items()}}


def main(job: dict[str, Any], rank: int, size: int) -> None:
    """Train every one of `cases`, and go on with every one of `resumed`; OUT/CASE-WORLD[-resumed].safetensors."""
    torch.set_num_threads(1)
    out = Path(job["out"])
    dist.init_process_group("gloo", init_method=f"file://{out}/{size}", rank=rank, world_size=size, timeout=WAIT)
    world = World(rank=rank, size=size, device=torch.device("cpu"))
    for case, sections in job["cases"].items():
        for resumes in (False, True) if case in job["resumed"] else (False,):
            seen = train(sections, world, out / f"{case} checkpoint", resumes)
            if world.is_main:
                save_file(seen, out / f"{case}-{size}{'-resumed' if resumes else ''}.safetensors")
    leave_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    quiet_libraries()
    main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), int(sys.argv[3]))
