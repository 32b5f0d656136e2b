"""Averages of the weights over the last steps, which are validated and published where `train.average` says so."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard
from torchrec.distributed.model_parallel import DistributedModelParallel

from training.config import AverageConfig
from training.embeddings.fresh_rows import Rows, renew_weights

UPDATES = 20  # that a span has at least
_RAMP = 4  # the span is no longer than this part of the steps so far


class WeightAverage:
    """An exponential moving average of all of a sharded model's weights; each rank has those of its own shards.

    w̄ ← β w̄ + (1 − β) w with β = exp(−every / span), both in steps: a weight counts 1/e of what one does that is `span`
    steps younger. The span is `train.average.span` passes, and at first a quarter of the steps so far: then the average
    of step t has weights like s³ for the step s before, and next to nothing of what training started from.

    Averages are fp32. Buffers are none of it: running statistics are taken anew with the averages in place
    (`training.fit.recalibration`).

    Args:
        dmp: the sharded model, whose tables lie in its device's memory; its weights now are the first averages.
        config: the span, and how often.
    """

    def __init__(self, dmp: DistributedModelParallel, config: AverageConfig) -> None:
        buffers = {name for name, _ in dmp.named_buffers()}
        weights = {name: weight for name, weight in dmp.state_dict().items() if name not in buffers}
        self._config = config
        self._averages = {name: _copy(weight) for name, weight in weights.items()}
        # TorchRec hands out the same tensors every time; training, loading and new rows change them in place.
        self._weight_tensors = [tensor for weight in weights.values() for tensor in _local(weight)]
        self._average_tensors = [tensor for average in self._averages.values() for tensor in _local(average)]

    @torch.no_grad()
    def update(self, step: int, pass_steps: int) -> None:
        """Take the weights after `step` steps in, if it is their turn; `pass_steps` are those of the pass under way."""
        span = self._config.span * pass_steps
        every = min(self._config.every, max(1, int(span / UPDATES)))
        if step % every == 0:
            share = -math.expm1(-every / min(span, step / _RAMP))
            weights = [weight.to(torch.float32) for weight in self._weight_tensors]
            torch._foreach_lerp_(self._average_tensors, weights, share)

    def renew(self, fresh: Mapping[str, Rows]) -> None:
        """Begin anew with rows of tables that have changed hands, as `ManagedIds.update` gives them."""
        renew_weights(self._averages, fresh)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """For the length of a block the model has the averages, which in fp16 tables are rounded, for good."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, average in zip(self._weight_tensors, self._average_tensors, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """The averages as the model's state has the weights, shards included; filling them in place is loading."""
        return self._averages


def _local(weight: Any) -> list[torch.Tensor]:
    """What this rank has of a weight."""
    if isinstance(weight, ShardedTensor):
        return [shard.tensor.detach() for shard in weight.local_shards()]
    return [weight.detach()]


def _copy(weight: Any) -> Any:
    """A copy in fp32, cut and placed as the weight is."""
    if not isinstance(weight, ShardedTensor):
        return weight.detach().to(torch.float32, copy=True)
    metadata = weight.metadata()
    properties = replace(metadata.tensor_properties, dtype=torch.float32)
    shards = [Shard(part.tensor.detach().to(torch.float32, copy=True), part.metadata) for part in weight.local_shards()]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, replace(metadata, tensor_properties=properties), process_group=weight._process_group
    )
