"""Encoded rows into batches for TorchRec, the same rows in the same order whatever the number of ranks.

Legend: N rows of a split, B rows of a rank's batch, F fields.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from features.checks import LABEL, WEIGHT
from features.errors import InputError

_PARTS = 8  # an epoch's last batch is at least this part of a whole one

IndexB = npt.NDArray[np.int64]


@dataclass
class Batch(Pipelineable):
    """One rank's share of a step. `weight_B` sums to the number of ranks over all ranks (see `BatchLoader`)."""

    ids: KeyedJaggedTensor
    label_B: torch.Tensor
    weight_B: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(
            self.ids.to(device=device, non_blocking=non_blocking),
            self.label_B.to(device=device, non_blocking=non_blocking),
            self.weight_B.to(device=device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        self.ids.record_stream(stream)
        self.label_B.record_stream(stream)
        self.weight_B.record_stream(stream)

    def pin_memory(self) -> "Batch":
        return Batch(self.ids.pin_memory(), self.label_B.pin_memory(), self.weight_B.pin_memory())


class EncodedRows:
    """Encoded fields of N rows in memory, ready to be gathered into `KeyedJaggedTensor`s."""

    def __init__(self, table: pa.Table, names: tuple[str, ...]) -> None:
        self.names = names
        self.num_rows: int = table.num_rows
        self._columns = [_ragged(table[name]) for name in names]

    def gather(self, row_B: IndexB) -> KeyedJaggedTensor:
        """The ids of the given rows, field by field in the order of `names`."""
        values, lengths = [], []
        for ids, offsets in self._columns:
            if offsets is None:
                values.append(ids[row_B])
                lengths.append(np.ones(len(row_B), np.int64))
                continue
            length_B = offsets[row_B + 1] - offsets[row_B]
            first_B = np.cumsum(length_B) - length_B
            values.append(ids[np.arange(length_B.sum()) + np.repeat(offsets[row_B] - first_B, length_B)])
            lengths.append(length_B)
        return KeyedJaggedTensor(
            keys=list(self.names),
            values=torch.from_numpy(np.concatenate(values)),
            lengths=torch.from_numpy(np.concatenate(lengths).astype(np.int32)),
        )


def _ragged(column: pa.ChunkedArray) -> tuple[IndexB, IndexB | None]:
    if not pa.types.is_list(column.type):
        return column.to_numpy(), None
    lengths = pc.list_value_length(column).to_numpy()
    return pc.list_flatten(column).to_numpy(), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of every global batch is this process's."""

    rank: int = 0
    world: int = 1


class BatchLoader:
    """Cuts a split into global batches and gives one rank its contiguous share of each.

    The order depends on the seed and the epoch only, so training does not depend on the number of ranks. The weights of
    a global batch are scaled to add up to the number of ranks: then the mean over ranks of each rank's Σ weight · loss
    is the batch's weighted mean loss, even where the last batch divides unevenly.
    """

    def __init__(
        self,
        table: pa.Table,
        names: tuple[str, ...],
        *,
        batch_size: int,
        share: Share | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        """Load a split.

        Args:
            table: an encoded split.
            names: the fields, in the order of F.
            batch_size: rows of a global batch, over all ranks.
            share: which part of it is this process's; by default all.
            shuffle_seed: None keeps the rows' order.

        Raises:
            InputError: some rank would have no rows.
        """
        self._rows = EncodedRows(table, names)
        self._label_N = table[LABEL].to_numpy().astype(np.float32)
        self._weight_N = table[WEIGHT].to_numpy().astype(np.float64)
        self._share = share or Share()
        self._seed = shuffle_seed
        if self._share.world > 1 and min(batch_size // _PARTS, self._rows.num_rows) < self._share.world:
            raise InputError(
                f"{self._share.world} processes are too many for batches of {batch_size} out of "
                f"{self._rows.num_rows} rows: a batch needs {_PARTS} rows per process"
            )
        whole, rest = divmod(self._rows.num_rows, batch_size)
        # A small rest joins the batch before it: then every rank has rows in every step, and no step is mostly noise.
        # Not by the number of ranks, or the steps would depend on it.
        merged = whole > 0 and 0 < rest * _PARTS < batch_size
        self._ends = [batch_size * (i + 1) for i in range(whole - merged)] + ([self._rows.num_rows] if rest else [])

    def __len__(self) -> int:
        """Steps per epoch."""
        return len(self._ends)

    @property
    def num_rows(self) -> int:
        return self._rows.num_rows

    def epoch(self, number: int) -> Iterator[Batch]:
        """This rank's batches of an epoch."""
        if self._seed is None:
            order = np.arange(self._rows.num_rows)
        else:
            order = np.random.default_rng((self._seed, number)).permutation(self._rows.num_rows)
        for start, end in zip([0, *self._ends], self._ends, strict=False):
            yield self._batch(order[start:end])

    def _batch(self, row_G: IndexB) -> Batch:
        rank, world = self._share.rank, self._share.world
        row_B = row_G[len(row_G) * rank // world : len(row_G) * (rank + 1) // world]
        total = self._weight_N[row_G].sum()
        scale = world / total if total > 0 else 0.0
        return Batch(
            self._rows.gather(row_B),
            torch.from_numpy(self._label_N[row_B]),
            torch.from_numpy((self._weight_N[row_B] * scale).astype(np.float32)),
        )
