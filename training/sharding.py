"""The model over several processes: TorchRec plans where the tables go, and this module fills and collects them."""

from collections.abc import Callable

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

from masknet.model import Table, table_key
from training.config import DenseOptimizer, SparseOptimizer
from training.distributed import World
from training.projection import Projection
from training.scale import Scale

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
    model: nn.Module, tables: tuple[Table, ...], optimizer: SparseOptimizer, world: World, *, frozen: bool = False
) -> DistributedModelParallel:
    """Plan, place and wrap `model`, whose tables are on the meta device; every rank must call this.

    With `frozen` the tables stay as they are: their optimizer, which is a part of the backward pass, gets a rate of 0.
    """
    sharder = EmbeddingBagCollectionSharder(
        fused_params={"optimizer": _FUSED[optimizer.name], "learning_rate": 0.0 if frozen else optimizer.lr}
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


def fill_tables(
    dmp: DistributedModelParallel, tables: tuple[Table, ...], rows_of: Callable[[Table], torch.Tensor]
) -> None:
    """Give every shard its slice of the table's rows [rows, d], so that the start does not depend on the plan."""
    shards = _sharded_tables(dmp)
    for index, table in enumerate(tables):
        rows = rows_of(table)
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


def build_optimizer(dmp: DistributedModelParallel, config: DenseOptimizer, network: nn.Module) -> CombinedOptimizer:
    """The dense optimizer and the one that is fused into the tables' backward pass, as one."""
    parameters = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    dense = KeyedOptimizerWrapper(trained, lambda params: _dense_optimizer(list(params), config, network))
    return CombinedOptimizer([("dense", dense), ("", dmp.fused_optimizer)])


def _dense_optimizer(params: list[nn.Parameter], config: DenseOptimizer, network: nn.Module) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer
    if config.name == "scale":
        optimizer = Scale(network, params, lr=config.lr, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.Adam(params, lr=config.lr, weight_decay=config.weight_decay)
    if config.normalize_and_project:
        project = Projection(network)
        optimizer.register_step_post_hook(lambda *_: project())
    return optimizer


def unwrapped(dmp: DistributedModelParallel) -> nn.Module:
    """The module that was given to `shard`, below the data-parallel wrapper."""
    inner: nn.Module = dmp.module
    return getattr(inner, "module", inner)
