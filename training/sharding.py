"""The model over several processes: TorchRec plans where the tables go, and this module fills and collects them."""

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingEnv, ShardingType
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from masknet.model import Table, initial_rows, table_key
from training.config import OptimizerConfig, SparseOptimizer
from training.distributed import World

_FUSED = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}


def _sharding_types(optimizer: str) -> list[str]:
    """What the planner may choose from, so that the result of training does not depend on its choice.

    Not data_parallel: the fused optimizer never updates such tables. Not by columns with row-wise Adagrad: its one
    statistic per row would become one per shard, which is another method.
    """
    by_columns = [ShardingType.COLUMN_WISE.value, ShardingType.TABLE_COLUMN_WISE.value]
    return [ShardingType.TABLE_WISE.value, *([] if optimizer == "rowwise_adagrad" else by_columns)]


def shard(
    model: nn.Module, tables: tuple[Table, ...], optimizer: SparseOptimizer, world: World
) -> DistributedModelParallel:
    """Plan, place and wrap `model`, whose tables are on the meta device; every rank must call this."""
    sharder = EmbeddingBagCollectionSharder(
        fused_params={"optimizer": _FUSED[optimizer.name], "learning_rate": optimizer.lr}
    )
    constraint = ParameterConstraints(sharding_types=_sharding_types(optimizer.name))
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world.size, compute_device=world.device.type),
        constraints={table_key(index): constraint for index in range(len(tables))},
    )
    group = dist.group.WORLD
    assert group is not None  # join_world has made it
    plan = planner.collective_plan(model, [sharder], group)
    return DistributedModelParallel(
        model, env=ShardingEnv.from_process_group(group), device=world.device, plan=plan, sharders=[sharder]
    )


def initialize_tables(dmp: DistributedModelParallel, tables: tuple[Table, ...], dim: int, seed: int) -> None:
    """Give every shard its slice of the table's seeded initial rows, so that the start does not depend on the plan."""
    shards = _sharded_tables(dmp)
    for index, table in enumerate(tables):
        rows = initial_rows(table, dim, seed)
        for local in shards[table_key(index)].local_shards():
            (row, column), (height, width) = local.metadata.shard_offsets, local.metadata.shard_sizes
            local.tensor.detach().copy_(rows[row : row + height, column : column + width])


def gather_tables(dmp: DistributedModelParallel, names: list[str]) -> dict[str, torch.Tensor]:
    """Whole tables by their names, given in order, on rank 0, and nothing elsewhere; every rank must call this."""
    full: dict[str, torch.Tensor] = {}
    shards = _sharded_tables(dmp)
    for index, name in enumerate(names):
        sharded = shards[table_key(index)]
        out = torch.empty(sharded.size()) if dist.get_rank() == 0 else None
        sharded.gather(dst=0, out=out)
        if out is not None:
            full[name] = out
    return full


def _sharded_tables(dmp: DistributedModelParallel) -> dict[str, ShardedTensor]:
    suffix = ".weight"
    return {
        key.removesuffix(suffix).rpartition("embedding_bags.")[2]: value
        for key, value in dmp.state_dict().items()
        if isinstance(value, ShardedTensor)
    }


def build_optimizer(dmp: DistributedModelParallel, config: OptimizerConfig) -> CombinedOptimizer:
    """The dense optimizer and the one that is fused into the tables' backward pass, as one."""
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(dmp.named_parameters())),
        lambda params: torch.optim.Adam(params, lr=config.dense.lr, weight_decay=config.dense.weight_decay),
    )
    return CombinedOptimizer([("dense", dense), ("", dmp.fused_optimizer)])


def unwrapped(dmp: DistributedModelParallel) -> nn.Module:
    """The module that was given to `shard`, below the data-parallel wrapper."""
    inner: nn.Module = dmp.module
    return getattr(inner, "module", inner)
