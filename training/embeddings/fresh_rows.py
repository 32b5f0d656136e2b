"""Rows of sharded tables that start anew, in the middle of training: weights given, optimizer's state zero.

Legend: E rows of a table, d its columns.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from training.embeddings.sharding import table_of

Rows = tuple[torch.Tensor, torch.Tensor]  # ascending rows [E] of a table, and weights [E, d]
Fresh = dict[str, Rows]  # by TorchRec's name of the table


class _Shard(NamedTuple):
    """A part of a table on this rank, and its first row and column in the table."""

    tensor: torch.Tensor
    row: int
    column: int


@torch.no_grad()
def renew_rows(
    dmp: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    fresh: Mapping[str, Rows],
) -> None:
    """Set rows of tables in this rank's shards, in place, and what the optimizer knows of them to zero.

    Args:
        dmp: the sharded model, which no batch is on its way to.
        optimizer: its optimizer, fused ones included.
        fresh: which rows, and the weights that they start with; the same on every rank.
    """
    states = {table_of(name): state for name, state in optimizer.state_dict()["state"].items()}
    # Taking the state dictionary has written what FBGEMM's caches of tables in host memory hold.
    weights = {name: value for name, value in dmp.state_dict().items() if table_of(name) in fresh}
    renew_weights(weights, fresh)
    for name, value in weights.items():
        rows_E, _ = fresh[table_of(name)]
        for kept in states.get(table_of(name), {}).values():
            _clear(kept, _local_shards(value), rows_E)
    _drop_caches(dmp)


@torch.no_grad()
def renew_weights(weights: Mapping[str, Any], fresh: Mapping[str, Rows]) -> None:
    """Set rows of this rank's shards of tables, in place, in a model's state or one like it; `fresh` as above."""
    for name, value in weights.items():
        if (found := fresh.get(table_of(name))) is not None:
            for shard in _local_shards(value):
                _renew(shard, *found)


def _local_shards(value: Any) -> list[_Shard]:
    if not isinstance(value, ShardedTensor):
        return [_Shard(value.detach(), 0, 0)]  # whole on every rank
    parts = [(part.tensor.detach(), [*part.metadata.shard_offsets, 0]) for part in value.local_shards()]
    return [_Shard(tensor, offsets[0], offsets[1]) for tensor, offsets in parts]


def _places(shard: _Shard, rows_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the rows are in a shard, and where."""
    inside_E = (rows_E >= shard.row) & (rows_E < shard.row + len(shard.tensor))
    return inside_E, (rows_E[inside_E] - shard.row).to(shard.tensor.device)


def _renew(shard: _Shard, rows_E: torch.Tensor, weight_Ed: torch.Tensor) -> None:
    inside_E, place = _places(shard, rows_E)
    columns = slice(shard.column, shard.column + shard.tensor.shape[1])
    shard.tensor[place] = weight_Ed[inside_E, columns].to(shard.tensor)


def _clear(kept: Any, weights: list[_Shard], rows_E: torch.Tensor) -> None:
    """Zero the rows of one kind of state: by weight or by row, in shards as the weights are; a step's number stays.

    Statistics by row of a table cut by columns stand one below the other, a set for each shard of the weights: only the
    weights' shards know which row of the table one is of.
    """
    if not isinstance(kept, torch.Tensor) or kept.dim() == 0:
        return
    for state, weight in zip(_local_shards(kept), weights, strict=True):
        if len(state.tensor) == len(weight.tensor):
            _, place = _places(weight, rows_E)
            state.tensor[place] = 0


def _drop_caches(dmp: DistributedModelParallel) -> None:
    """Let FBGEMM's caches of tables in host memory forget what they hold, as TorchRec does when weights are loaded."""
    for module in dmp.modules():
        for lookup in getattr(module, "_lookups", ()):
            inner = lookup.module if isinstance(lookup, DistributedDataParallel) else lookup
            inner.purge()
