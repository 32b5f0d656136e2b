"""Maps from managed ids to rows of their tables: what training has decided, as scoring uses it.

Legend: K ids that have a row, N ids that are looked up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.encoders import FIRST, UNKNOWN
from features.errors import InputError
from features.hashing import HashIndex, HashN
from features.pipeline import FeaturePipeline

IdsN = npt.NDArray[np.int64]
RowsN = npt.NDArray[np.int32]


@dataclass(frozen=True)
class IdMap:
    """Ids in ascending order, the row of each, and what training knows of their use.

    Args:
        ids_K: int64, as a managed field's encoder gives them.
        rows_K: int32.
        usage: int64 [K] each, by the names of TorchRec's eviction policies: `counts`, `last_access_iter`.
        step: the training steps done, in which `last_access_iter` counts.
    """

    ids_K: IdsN
    rows_K: RowsN
    usage: Mapping[str, IdsN] = field(default_factory=dict)
    step: int = 0

    def rows(self, ids_N: IdsN) -> RowsN:
        """Rows of ids [N]; of one that has none, the row of the never seen. Missing is missing."""
        return find_rows(self._index, ids_N)

    @cached_property
    def _index(self) -> HashIndex:
        return index_of(self.ids_K, self.rows_K)

    def require_rows_below(self, num_rows: int, name: str) -> None:
        """InputError that begins with `name` unless the ids ascend and have own rows, of a table's `num_rows`."""
        in_order = bool((self.ids_K[1:] > self.ids_K[:-1]).all()) and bool((self.ids_K >= FIRST).all())
        inside = bool(((self.rows_K >= FIRST) & (self.rows_K < num_rows)).all())
        one_each = len(np.unique(self.rows_K)) == len(self.rows_K) == len(self.ids_K)
        used = all(len(values_K) == len(self.ids_K) for values_K in self.usage.values())
        if not (in_order and inside and one_each and used):
            raise InputError(f"{name}: its ids are not in order, or have no rows of their own below {num_rows}")


def index_of(ids_K: IdsN, rows_K: RowsN) -> HashIndex:
    """What finds the rows of ids; 32 bytes an id."""
    return HashIndex(_spread(ids_K), rows_K, UNKNOWN)


def find_rows(index: HashIndex, ids_N: IdsN) -> RowsN:
    """Rows [N] of ids; those of missing and never seen stand for themselves."""
    rows_N = index.find(_spread(ids_N))
    reserved_N = ids_N < FIRST
    rows_N[reserved_N] = ids_N[reserved_N]
    return rows_N


def _spread(ids_N: IdsN) -> HashN:
    """Ids of 63 bits over the 64 that an index expects."""
    return ids_N.view(np.uint64) << np.uint64(1)


def with_rows(encoded: pa.Table, pipeline: FeaturePipeline, id_maps: Mapping[str, IdMap]) -> pa.Table:
    """Encoded rows with rows of tables (int32) in place of the managed fields' ids; `id_maps` are by owner."""
    for name, owner in pipeline.managed.items():
        column = encoded[name].combine_chunks()
        encoded = encoded.set_column(encoded.column_names.index(name), name, _rows_of(column, id_maps[owner]))
    return encoded


def _rows_of(column: pa.Array, id_map: IdMap) -> pa.Array:
    if not pa.types.is_list(column.type):
        return pa.array(id_map.rows(column.to_numpy(zero_copy_only=False)))
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    rows = id_map.rows(pc.list_flatten(column).to_numpy(zero_copy_only=False))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows))
