"""One process of test_managed_over_ranks: trains on its share of every batch, and writes maps and tables at the end.

It does so as one of four, then as one of two, then alone if it is the first: python managed_worker.py OUT RANK. The two
also write a checkpoint of their maps between two updates, from which all start a second time.
"""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from features.batches import Batch, EncodedRows
from features.encoders import Managed
from features.pipeline import FeaturePipeline
from features.schema import Schema
from masknet.model import MaskNet, initial_rows
from serving.bundle import fields_of, tables_of
from training.config import Config
from training.distributed import World, leave_group
from training.embeddings.managed import ManagedIds
from training.embeddings.sharding import fill_tables, gather_tables, shard
from training.fit.checkpoints import plain_tensors
from training.fit.task import ClickTask
from training.optim.optimizers import build_optimizer
from training.quiet import quiet_libraries

ROWS, STEPS, EVERY, SAVED_AT, DIM = 32, 28, 4, 14, 4
EVICTIONS = ("lfu", "lru", "distance_lfu")
FIELDS = [
    {"name": name, "type": "categorical", "encoder": "managed", "buckets": 14, "eviction": name} for name in EVICTIONS
] + [{"name": "list", "type": "list", "separator": " ", "share_with": "lru"}]
SCHEMA = Schema.model_validate({"name": "ranks", "label": {"column": "click"}, "fields": FIELDS})
PIPELINE = FeaturePipeline.build(SCHEMA.fields, {name: Managed(14, name) for name in EVICTIONS})
TABLES = tables_of(PIPELINE)
CONFIG = Config.model_validate(
    {
        "experiment": "ranks",
        "model": {"embedding_dim": DIM, "blocks": 1, "block_width": 6, "head": []},
        "optimizer": {"sparse": {"name": "rowwise_adagrad", "lr": 0.05}},
        "tracking": {"registered_model": "ranks"},
    }
)


def batches(rank: int, world: int) -> Iterator[Batch]:
    """A rank's share of batches in which, as time goes on, other ids are the frequent ones."""
    random = np.random.default_rng(4)
    for step in range(STEPS):
        drawn = np.minimum(random.zipf(1.4, (4, ROWS)), 15) + 2 * (step // EVERY)
        columns = {name: [f"id{i}" for i in ids] for name, ids in zip(EVICTIONS, drawn, strict=False)}
        columns["list"] = [" ".join(f"id{i + k}" for k in range(i % 3)) for i in drawn[3].tolist()]
        row_B = np.arange(ROWS * rank // world, ROWS * (rank + 1) // world)
        inputs = EncodedRows.of(PIPELINE.encode(columns), PIPELINE.layout).gather(row_B)
        label_B = torch.from_numpy((drawn[0] % 2).astype(np.float32))[row_B]
        yield Batch(*inputs, label_B, torch.full((len(row_B),), world / ROWS))


def train(world: World, checkpoint: Path, resumes: bool) -> dict[str, torch.Tensor]:
    """The maps' state, and the tables under "table NAME"."""
    torch.manual_seed(1)
    model = MaskNet(CONFIG.model, TABLES, fields_of(PIPELINE), device="meta")
    dmp = shard(ClickTask(model, "fp32", "cpu"), TABLES, CONFIG, world)
    fill_tables(dmp, TABLES, lambda table: initial_rows(table, DIM, 1))
    optimizer = build_optimizer(dmp, CONFIG, model.network)
    managed = ManagedIds(PIPELINE, TABLES, dim=DIM, seed=1, world=world)
    if resumes:
        state: dict[str, Any] = {"managed": plain_tensors(checkpoint, "managed")}
        dcp.load(state, checkpoint_id=checkpoint)
        managed.load_state_dict(state["managed"])
    for step, batch in enumerate(batches(world.rank, world.size), 1):
        if resumes and step <= SAVED_AT:
            continue
        optimizer.zero_grad()
        loss, _ = dmp(managed.observe(batch))
        loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            managed.update(dmp, optimizer)
        if step == SAVED_AT and world.size == 2:
            dcp.save({"managed": managed.state_dict()}, checkpoint_id=checkpoint)
    tables = gather_tables(dmp, [table.name for table in TABLES])
    return {**managed.state_dict(), **{f"table {name}": weight for name, weight in tables.items()}}


def main(out: Path, rank: int) -> None:
    """Train in every number of processes; OUT/WORLD-RANK[-resumed].safetensors."""
    torch.set_num_threads(1)
    for name in ("", "-resumed"):
        for size in (4, 2, 1):  # all four first: TorchRec has its processes agree on something once in their lives
            if rank >= size:
                continue
            dist.init_process_group("gloo", init_method=f"file://{out}/{size}{name}", rank=rank, world_size=size)
            world = World(rank=rank, size=size, device=torch.device("cpu"))
            save_file(train(world, out / "checkpoint", bool(name)), out / f"{size}-{rank}{name}.safetensors")
            leave_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    quiet_libraries()
    main(Path(sys.argv[1]), int(sys.argv[2]))
