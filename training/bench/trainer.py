"""The parts of `masknet train` that make a step, put together without files, checkpoints and tracking."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from features.batches import Batch
from masknet.model import MaskNet, Table, initial_rows
from masknet.values import ValueField
from training.config import Config
from training.distributed import World
from training.embeddings.sharding import fill_tables, shard
from training.fit.guard import Guard, build_pipeline
from training.fit.precision import Precision, set_precision
from training.fit.stopwatch import Stopwatch
from training.fit.task import ClickTask, StepOutput
from training.optim.optimizers import build_optimizer


def bench_config(
    *, precision: Precision, sparse: str = "rowwise_adagrad", sparse_lr: float = 0.02, batch_size: int = 4096
) -> Config:
    """The shapes that training is measured with: 3 parallel blocks × 400, r = 2, a head of 400, 400, fields × 16."""
    settings: dict[str, Any] = {
        "experiment": "bench",
        "tracking": {"registered_model": "bench"},
        "optimizer": {"sparse": {"name": sparse, "lr": sparse_lr}},
        "train": {"precision": precision, "batch_size": batch_size},
    }
    return Config.model_validate(settings)


class Trainer:
    """A sharded model with its optimizers in TorchRec's pipeline; make it inside of `join_world`."""

    def __init__(
        self, config: Config, tables: tuple[Table, ...], fields: tuple[str | ValueField, ...], world: World
    ) -> None:
        self.config = config
        set_precision(config.train.precision, world.device)
        torch.manual_seed(config.train.seed)
        self.model = MaskNet(config.model, tables, fields, device="meta")
        self.dmp = shard(ClickTask(self.model, config.train.precision, world.device.type), tables, config, world)
        shape, seed = config.model, config.train.seed
        fill_tables(
            self.dmp, tables, lambda table: initial_rows(table, shape.embedding_dim, seed, shape.embedding_init)
        )
        self.optimizer = build_optimizer(self.dmp, config, self.model.network)
        guard = Guard(self.dmp, self.model, config, world, Path("failed"), Stopwatch())
        self.pipeline = build_pipeline(self.dmp, self.optimizer, config, world, guard)
        self.dmp.train()

    def step(self, batches: Iterator[Batch]) -> StepOutput:
        """One step; StopIteration when there are no batches left and those in flight are done."""
        output: StepOutput = self.pipeline.progress(batches)
        return output
