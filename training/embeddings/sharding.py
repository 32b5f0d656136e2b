"""The model over several processes: TorchRec plans where the tables go, and this module fills and collects them."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from features.errors import InputError, one_line
from masknet.model import Table, table_key
from training.config import Config
from training.distributed import World
from training.embeddings.placement import Placement, placements
from training.sections import SparseOptimizer

FUSED_EPS = 1.0e-8  # beside a root of squares, in FBGEMM
_BAGS = "embedding_bags."  # in the name of every table's weight
_FUSED = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adam": EmbOptimType.ADAM,
    "partial_rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
    "lamb": EmbOptimType.LAMB,
}
_DTYPES = {"fp32": (DataType.FP32, torch.float32), "fp16": (DataType.FP16, torch.float16)}


def shard(
    model: nn.Module, tables: tuple[Table, ...], config: Config, world: World, *, frozen: bool = False
) -> DistributedModelParallel:
    """Plan, place and wrap `model`, whose tables are on the meta device; every rank must call this.

    With `frozen` the tables stay as they are: their optimizer, which is a part of the backward pass, gets a rate of 0.

    Raises:
        InputError: the device cannot do what `config.sharding` asks for, or the tables do not fit.
    """
    sharder = _sharder(config.optimizer.sparse, frozen)
    placed = placements(config, tables, world.size, world.device.type)
    _set_dtypes(model, placed)
    group = dist.group.WORLD
    assert group is not None  # join_world has made it
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))  # torchrun's
    planner = _planner(config, placed, world.size, per_machine, world.device.type)
    try:
        plan = planner.collective_plan(model, [sharder], group)
    except PlannerError as error:
        raise _no_plan(error, tables, config, f"{world.size} × {world.device.type}") from None
    return DistributedModelParallel(
        model, env=ShardingEnv.from_process_group(group), device=world.device, plan=plan, sharders=[sharder]
    )


def plan_offline(
    model: nn.Module, tables: tuple[Table, ...], config: Config, device: str, *, world_size: int, per_machine: int
) -> ShardingPlan:
    """The plan that `shard` makes for so many processes, without them; `model` is on the meta device.

    Raises:
        InputError: as `shard`.
    """
    placed = placements(config, tables, world_size, device)
    _set_dtypes(model, placed)
    planner = _planner(config, placed, world_size, per_machine, device)
    try:
        return planner.plan(model, [_sharder(config.optimizer.sparse, frozen=False)])
    except PlannerError as error:
        raise _no_plan(error, tables, config, f"{world_size} × {device}") from None


def _no_plan(error: PlannerError, tables: tuple[Table, ...], config: Config, where: str) -> InputError:
    weights = sum(table.rows for table in tables) * config.model.embedding_dim
    reason = one_line(error).partition(". ")[0]  # what follows are the planner's own figures
    return InputError(f"sharding: {weights:,} weights of tables and their optimizer's state on {where}: {reason}")


def _sharder(optimizer: SparseOptimizer, frozen: bool) -> EmbeddingBagCollectionSharder:
    fused: dict[str, Any] = {"optimizer": _FUSED[optimizer.name], "learning_rate": 0.0 if frozen else optimizer.lr}
    if optimizer.weight_decay:
        fused |= {"weight_decay": optimizer.weight_decay, "weight_decay_mode": WeightDecayMode.L2}
    return EmbeddingBagCollectionSharder(fused_params={**fused, "eps": FUSED_EPS})


def _planner(
    config: Config, placed: dict[str, Placement], world_size: int, per_machine: int, device: str
) -> EmbeddingShardingPlanner:
    on_cuda = device == "cuda" and torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if on_cuda else None  # else the planner's own idea
    return EmbeddingShardingPlanner(
        topology=Topology(world_size=world_size, local_world_size=per_machine, compute_device=device, hbm_cap=memory),
        batch_size=max(1, config.train.batch_size // world_size),
        constraints={key: placement.constraint for key, placement in placed.items()},
    )


def _set_dtypes(model: nn.Module, placed: dict[str, Placement]) -> None:
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            for bag in module.embedding_bag_configs():
                bag.data_type, dtype = _DTYPES[placed[bag.name].dtype]
                module.embedding_bags[bag.name].to(dtype)


def fill_tables(
    dmp: DistributedModelParallel, tables: tuple[Table, ...], rows_of: Callable[[Table], torch.Tensor]
) -> None:
    """Give every shard its slice of the table's rows [rows, d], so that the start does not depend on the plan."""
    placed = _placed_tables(dmp)
    for index, table in enumerate(tables):
        rows, weight = rows_of(table), placed[table_key(index)]
        if not isinstance(weight, ShardedTensor):
            weight.detach().copy_(rows)
            continue
        for local in weight.local_shards():
            (row, column), (height, width) = local.metadata.shard_offsets, local.metadata.shard_sizes
            local.tensor.detach().copy_(rows[row : row + height, column : column + width])


def gather_tables(dmp: DistributedModelParallel, names: list[str]) -> dict[str, torch.Tensor]:
    """Whole tables in fp32 by their names, given in order, on rank 0, and nothing elsewhere; every rank must call."""
    full: dict[str, torch.Tensor] = {}
    placed = _placed_tables(dmp)
    for index, name in enumerate(names):
        weight = placed[table_key(index)]
        out: torch.Tensor | None = None
        if not isinstance(weight, ShardedTensor):
            out = weight.detach().cpu().clone() if dist.get_rank() == 0 else None
        else:
            out = torch.empty(weight.size(), dtype=weight.dtype) if dist.get_rank() == 0 else None
            weight.gather(dst=0, out=out)
        if out is not None:
            full[name] = out.float()
    return full


def _placed_tables(dmp: DistributedModelParallel) -> dict[str, ShardedTensor | torch.Tensor]:
    """By TorchRec's name: shards, or a whole table that every rank has."""
    return {table_of(name): value for name, value in dmp.state_dict().items() if table_of(name)}


def table_of(name: str) -> str:
    """TorchRec's name of the table whose weight is called `name`; "" for any other weight."""
    return name.removesuffix(".weight").rpartition(_BAGS)[2] if _BAGS in name else ""


def unwrapped(dmp: DistributedModelParallel) -> nn.Module:
    """The module that was given to `shard`, below the data-parallel wrapper."""
    inner: nn.Module = dmp.module
    return getattr(inner, "module", inner)
