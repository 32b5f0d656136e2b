"""Encoded rows as TorchRec's input.

Legend: N rows of a table, B rows of a batch, F fields with ids, V fields with values.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from features.pipeline import Layout

IndexB = npt.NDArray[np.int64]
IdsN = npt.NDArray[np.integer]  # int32; int64 where they are hashes


class Inputs(NamedTuple):
    """What a model reads: ids field by field, values [B, V] with 0 for missing, and 1 where a value is missing."""

    ids: KeyedJaggedTensor
    values_BV: torch.Tensor
    missing_BV: torch.Tensor


@dataclass
class Batch(Pipelineable):
    """One rank's share of a step. `weight_B` sums to the number of ranks over all ranks (see `features.loader`)."""

    ids: KeyedJaggedTensor
    values_BV: torch.Tensor
    missing_BV: torch.Tensor
    label_B: torch.Tensor
    weight_B: torch.Tensor

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.ids, self.values_BV, self.missing_BV)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(*(part.to(device=device, non_blocking=non_blocking) for part in self._parts()))

    def record_stream(self, stream: torch.Stream) -> None:
        for part in self._parts():
            part.record_stream(stream)

    def pin_memory(self) -> "Batch":
        return Batch(*(part.pin_memory() for part in self._parts()))

    def _parts(self) -> list[torch.Tensor | KeyedJaggedTensor]:
        return [getattr(self, field.name) for field in fields(self)]


class _Ragged(NamedTuple):
    """A list field's ids: `values[offsets[i]:offsets[i + 1]]` are row i's."""

    values: IdsN
    offsets: IndexB

    def take(self, row_B: IndexB) -> "_Ragged":
        length_B = self.offsets[row_B + 1] - self.offsets[row_B]
        ends = np.cumsum(length_B)
        place = np.arange(length_B.sum()) + np.repeat(self.offsets[row_B] - (ends - length_B), length_B)
        return _Ragged(self.values[place], np.concatenate([[0], ends]))


class EncodedRows:
    """Encoded fields of N rows in memory, ready to be gathered. Single ids stand row by row: a gather reads lines.

    They are int32, unless there are hashes (managed fields) among them.
    """

    def __init__(self, layout: Layout, single_NF: torch.Tensor, ragged: dict[str, _Ragged], values: "Values") -> None:
        self.layout = layout
        self._single_NF, self._ragged, self._values = single_NF, ragged, values
        self._singles = [name for name in layout.ids if name not in ragged]

    @classmethod
    def of(cls, table: pa.Table, layout: Layout) -> "EncodedRows":
        """From a table that a pipeline has encoded."""
        columns = {name: table[name].combine_chunks() for name in layout.ids}
        ragged = {name: _ragged(column) for name, column in columns.items() if pa.types.is_list(column.type)}
        singles = [torch.from_numpy(_writable(columns[name])) for name in layout.ids if name not in ragged]
        if any(ids_N.dtype == torch.int64 for ids_N in singles):
            singles = [ids_N.to(torch.int64) for ids_N in singles]
        single_NF = torch.stack(singles, dim=1) if singles else torch.empty(table.num_rows, 0, dtype=torch.int32)
        return cls(layout, single_NF, ragged, Values.of(table, layout.values))

    @property
    def num_rows(self) -> int:
        return len(self._single_NF)

    def gather(self, row_B: IndexB) -> Inputs:
        """The given rows as a model's input, fields in the order of the layout."""
        index_B = torch.from_numpy(row_B)
        single_FB = self._single_NF.index_select(0, index_B).t().to(torch.int64, memory_format=torch.contiguous_format)
        values = self._values.take(index_B)
        if not self._ragged:
            lengths = torch.ones(single_FB.numel(), dtype=torch.int32)
            return Inputs(KeyedJaggedTensor(list(self.layout.ids), single_FB.flatten(), lengths=lengths), *values)
        parts, lengths_F = [], []
        for name in self.layout.ids:
            if name in self._ragged:
                taken = self._ragged[name].take(row_B)
                parts.append(torch.from_numpy(taken.values.astype(np.int64)))
                lengths_F.append(torch.from_numpy(np.diff(taken.offsets).astype(np.int32)))
            else:
                parts.append(single_FB[self._singles.index(name)])
                lengths_F.append(torch.ones(len(row_B), dtype=torch.int32))
        ids = KeyedJaggedTensor(list(self.layout.ids), torch.cat(parts), lengths=torch.cat(lengths_F))
        return Inputs(ids, *values)

    def take(self, row_B: IndexB) -> "EncodedRows":
        """The given rows as rows of their own."""
        index_B = torch.from_numpy(row_B)
        ragged = {name: column.take(row_B) for name, column in self._ragged.items()}
        single_BF = self._single_NF.index_select(0, index_B)
        return EncodedRows(self.layout, single_BF, ragged, self._values.take(index_B))

    def followed_by(self, other: "EncodedRows") -> "EncodedRows":
        """These rows, then the other's."""
        ragged = {}
        for name, (ids, offsets) in self._ragged.items():
            more_ids, more_offsets = other._ragged[name]
            joined = np.concatenate([offsets, more_offsets[1:] + offsets[-1]])
            ragged[name] = _Ragged(np.concatenate([ids, more_ids]), joined)
        single_NF = torch.cat([self._single_NF, other._single_NF])
        values = Values(*(torch.cat(pair) for pair in zip(self._values, other._values, strict=True)))
        return EncodedRows(self.layout, single_NF, ragged, values)

    def hide(self, name: str, rate: float, hidden_id: int, random: np.random.Generator) -> None:
        """Replace the share `rate` of a field's ids, in place."""
        if name in self._ragged:
            values = self._ragged[name].values
            values[random.random(len(values)) < rate] = hidden_id
        else:
            hidden_N = torch.from_numpy(random.random(self.num_rows) < rate)
            self._single_NF[hidden_N, self._singles.index(name)] = hidden_id


class Values(NamedTuple):
    """Value fields [N, V]: the values, with 0 for missing, and which are missing (1)."""

    values_NV: torch.Tensor
    missing_NV: torch.Tensor

    @classmethod
    def of(cls, table: pa.Table, names: tuple[str, ...]) -> "Values":
        """From encoded columns, null where missing."""
        if not names:
            return cls(torch.empty(table.num_rows, 0), torch.empty(table.num_rows, 0))
        columns = [table[name].combine_chunks() for name in names]
        missing = [column.is_null().to_numpy(zero_copy_only=False) for column in columns]
        numbers = [pc.fill_null(column, 0.0).to_numpy(zero_copy_only=False) for column in columns]
        return cls(
            torch.from_numpy(np.stack(numbers, axis=1).astype(np.float32)),
            torch.from_numpy(np.stack(missing, axis=1).astype(np.float32)),
        )

    def take(self, index_B: torch.Tensor) -> "Values":
        """The given rows."""
        return Values(self.values_NV.index_select(0, index_B), self.missing_NV.index_select(0, index_B))


def _ragged(column: pa.Array) -> _Ragged:
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    values = pc.list_flatten(column).to_numpy(zero_copy_only=False).copy()
    return _Ragged(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def _writable(column: pa.Array) -> IdsN:
    return column.to_numpy(zero_copy_only=False).copy()
