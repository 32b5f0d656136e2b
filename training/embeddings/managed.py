"""Managed fields in training: ids that were never seen before get rows while training goes on.

A map stands before the sharded tables, the same on every rank and on every device: batches hold rows when they reach
the model. It changes between segments of steps only, when no batch is on its way.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.batches import Batch
from features.encoders import Managed
from features.id_maps import IdMap
from features.pipeline import FeaturePipeline
from masknet.model import Table, initial_rows, table_key
from masknet.values import INIT_STD
from training.distributed import World
from training.embeddings.counted_ids import CountedIds
from training.embeddings.fresh_rows import Fresh, renew_rows
from training.embeddings.id_table import IdTable

_STEP, _COUNTED = "step", "counted"


class ManagedIds:
    """The maps of all managed tables.

    Args:
        pipeline: the fields, managed or not.
        tables: the model's tables, in their order.
        dim: width of the embeddings.
        seed: decides what rows start with that change hands.
        world: this process.
        frozen: the tables are not trained; then no id gets a row either, which would stay as it is drawn.
        std: standard deviation of what rows start with that change hands.
    """

    def __init__(
        self,
        pipeline: FeaturePipeline,
        tables: tuple[Table, ...],
        *,
        dim: int,
        seed: int,
        world: World,
        frozen: bool = False,
        std: float = INIT_STD,
    ) -> None:
        self._owners = pipeline.managed
        self._tables = {table.name: (table_key(index), table) for index, table in enumerate(tables)}
        self._ids = {
            field.name: IdTable(field.encoder.buckets, field.encoder.eviction)
            for field in pipeline.fields
            if isinstance(field.encoder, Managed) and field.owner == field.name
        }
        self._counted = {name: CountedIds() for name in self._ids}
        self._dim, self._seed, self._std = dim, seed, std
        self._world, self._frozen = world, frozen
        self._step = 0

    @property
    def is_empty(self) -> bool:
        """Whether no field is managed, so that there is nothing to do."""
        return not self._ids

    def start_from(self, id_maps: Mapping[str, IdMap]) -> None:
        """Go on from the maps of a bundle."""
        for name, table in self._ids.items():
            table.start_from(id_maps[name])
            self._step = max(self._step, id_maps[name].step)

    def observe(self, batch: Batch) -> Batch:
        """The next step's batch with rows in place of ids, which are counted; every rank must call this once a step.

        The batch is one on the host, and must be looked up before the next `update`.
        """
        if self.is_empty:
            return batch
        self._step += 1
        return self._with_rows(batch, count=not self._frozen)

    def remap(self, batch: Batch) -> Batch:
        """A batch with rows in place of ids, for validation: nothing is counted."""
        return batch if self.is_empty else self._with_rows(batch, count=False)

    def _with_rows(self, batch: Batch, *, count: bool) -> Batch:
        ids = batch.ids
        values, ends = ids.values().clone(), ids.offset_per_key()
        for name, owner in self._owners.items():
            place = ids.keys().index(name)
            of_field = values[ends[place] : ends[place + 1]]
            ids_N = of_field.numpy()
            rows_N = self._ids[owner].rows(ids_N)
            if count:
                self._counted[owner].add(ids_N.copy(), self._step)
            ids_N[:] = rows_N
        mapped = KeyedJaggedTensor(ids.keys(), values, lengths=ids.lengths())
        mapped = mapped.pin_memory() if ids.values().is_pinned() else mapped
        return replace(batch, ids=mapped)

    def update(self, dmp: DistributedModelParallel, optimizer: CombinedOptimizer) -> Fresh:
        """Let the ids seen since the last update have rows, by the tables' policies; every rank must call this.

        Rows that change hands start anew: with weights as fresh rows have them, drawn for this update, and without any
        state of the optimizer.

        Args:
            dmp: the sharded model, which no batch is on its way to.
            optimizer: its optimizer, fused ones included.

        Returns:
            By TorchRec's name of a table, the rows that have changed hands [E] and their weights [E, d].
        """
        fresh: Fresh = {}
        for name, ids in self._ids.items():
            counted_U3 = self._counted[name].over_ranks(self._world)
            self._counted[name].clear()
            if not len(counted_U3):
                continue
            rows_E = ids.update(counted_U3, self._step)
            if len(rows_E):
                key, table = self._tables[name]
                fresh[key] = rows_E, self._fresh_weights(table, len(rows_E))
        if fresh:
            renew_rows(dmp, optimizer, fresh)
        return fresh

    def _fresh_weights(self, table: Table, rows: int) -> torch.Tensor:
        """Initial weights [rows, d] that no other table or update draws."""
        drawn = replace(table, name=f"{table.name}/{self._step}", rows=rows)
        return initial_rows(drawn, self._dim, self._seed, self._std)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All maps and counts as int64 tensors, the same on every rank; every rank must call this.

        A resumed training, on as many ranks or not, comes to the maps that it would have come to.
        """
        if self.is_empty:
            return {}
        state = {_STEP: torch.tensor([self._step])}
        for name, ids in self._ids.items():
            own = {**ids.tensors(), _COUNTED: self._counted[name].over_ranks(self._world)}
            state |= {f"{self._tables[name][0]}.{key}": tensor.clone() for key, tensor in own.items()}
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` gave, on any number of ranks."""
        if self.is_empty:
            return
        self._step = int(state[_STEP])
        for name, ids in self._ids.items():
            key = self._tables[name][0]
            ids.load({kind: state[f"{key}.{kind}"] for kind in ids.tensors()})
            self._counted[name].clear()
            if self._world.is_main:  # counts of all ranks: one of them goes on with them
                self._counted[name].replace(state[f"{key}.{_COUNTED}"])

    def frozen(self) -> dict[str, IdMap]:
        """Copies of the maps by the tables' names, as scoring uses them."""
        return {name: ids.frozen(self._step) for name, ids in self._ids.items()}
