"""A small sharded model and its batches, for tests of where tables go and of what optimizers do."""

from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.batches import Batch
from masknet.model import MaskNet, Table, initial_rows
from masknet.values import ValueField
from training.config import Config
from training.distributed import World
from training.embeddings.sharding import fill_tables, shard
from training.fit.task import ClickTask

DIM, ROWS = 16, 48
TABLES = (
    Table(name="item", features=("history", "item"), rows=40, pooling="mean"),
    Table(name="user", features=("user",), rows=9, pooling="sum"),
)
FIELDS = (ValueField(name="price"), "history", "item", "user")


def configured(**sections: dict[str, Any]) -> Config:
    """The model's configuration with these sections."""
    model = {"embedding_dim": DIM, "blocks": 2, "block_width": 16, "head": [8]}
    tracking = {"registered_model": "placed"}
    return Config.model_validate({"experiment": "placed", "model": model, "tracking": tracking, **sections})


def unsharded(config: Config) -> MaskNet:
    """The model as `placed` has it, in one piece."""
    torch.manual_seed(1)
    same = MaskNet(config.model, TABLES, FIELDS, device="meta")  # whose tables draw no random numbers
    model = MaskNet(config.model, TABLES, FIELDS)
    model.load_weights(same.dense_state(), [initial_rows(table, DIM, 1) * 10 for table in TABLES])
    return model


def placed(config: Config, world: World) -> tuple[DistributedModelParallel, MaskNet]:
    """The model sharded over the processes, and as the module that it is within."""
    torch.manual_seed(1)
    model = MaskNet(config.model, TABLES, FIELDS, device="meta")
    task = ClickTask(model, "fp32", world.device.type, embedding_l2=config.optimizer.embedding_l2)
    dmp = shard(task, TABLES, config, world, frozen=config.train.train_only_affine)
    fill_tables(dmp, TABLES, lambda table: initial_rows(table, DIM, 1) * 10)
    return dmp, model


def batches(steps: int, rank: int = 0, world: int = 1) -> list[Batch]:
    """A rank's share of so many batches of `ROWS` rows, in which ids repeat and others never occur."""
    random = torch.Generator().manual_seed(2)
    made = []
    for _ in range(steps):
        length_N = torch.randint(4, (ROWS,), generator=random)
        history = list(torch.randint(30, (int(length_N.sum()),), generator=random).split(length_N.tolist()))
        item_N, user_N = torch.randint(35, (ROWS,), generator=random), torch.randint(6, (ROWS,), generator=random)
        price_NV = torch.randn(ROWS, 1, generator=random)
        label_N = ((price_NV[:, 0] + item_N % 3 + torch.rand(ROWS, generator=random)) > 1.5).float()
        mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
        rows = len(item_N[mine])
        ids = KeyedJaggedTensor(
            keys=["history", "item", "user"],
            values=torch.cat([*history[mine], item_N[mine], user_N[mine]]),
            lengths=torch.cat([length_N[mine], torch.ones(2 * rows, dtype=torch.long)]).int(),
        )
        weight_B = torch.full((rows,), world / ROWS)
        made.append(Batch(ids, price_NV[mine], torch.zeros(rows, 1), label_N[mine], weight_B))
    return made
