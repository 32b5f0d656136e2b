"""Which managed id has which row of a table: TorchRec's eviction policies, driven with counts that all ranks agree on.

TorchRec's own module around the policies (`MCHManagedCollisionModule`) counts what its own process sees, forgets at a
checkpoint what it has counted since the last eviction, and its sharded form needs row-wise tables and an operator that
FBGEMM's CPU build lacks. Here the policies get counts from outside, so that any device, sharding and number of ranks
leads to the same map. The map is what TorchRec's module would have made of the same ids.

Legend: S places in the map, one more than there are ids with a row; U distinct ids.
"""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    MCHEvictionPolicy,
)

from features.encoders import FIRST
from features.hashing import HashIndex
from features.id_maps import IdMap, IdsN, RowsN, find_rows, index_of

_POLICIES: Final[dict[str, Callable[[], MCHEvictionPolicy]]] = {
    "lfu": LFU_EvictionPolicy,
    "lru": LRU_EvictionPolicy,
    "distance_lfu": DistanceLFU_EvictionPolicy,
}
_FREE = torch.iinfo(torch.int64).max  # in place of an id: larger than any, so that free places stand last


class IdTable:
    """The ids that have a row of one table, their rows, and what the policy knows of their use.

    A table of `num_rows` rows keeps row 0 for missing and 1 for never seen; S is `num_rows` − 1, since the policies
    keep one place, the last, free of ids.
    """

    def __init__(self, num_rows: int, eviction: str) -> None:
        self._policy = _POLICIES[eviction]()
        places = num_rows - 1
        self.ids_S = torch.full((places,), _FREE)
        self.rows_S = torch.arange(FIRST, FIRST + places)  # the last place's is beyond the table, and never given
        self.usage = {
            kind.metadata_name: torch.zeros(places, dtype=torch.int64)
            for kind in self._policy.metadata_info
            if kind.is_mch_metadata
        }
        self._index: HashIndex | None = None  # made when it is asked for, after every change

    def rows(self, ids_N: IdsN) -> RowsN:
        """Rows of ids [N]; the never-seen row for those that have none."""
        if self._index is None:
            given = self.frozen(0)
            self._index = index_of(given.ids_K, given.rows_K)
        return find_rows(self._index, ids_N)

    def update(self, counted_U3: torch.Tensor, step: int) -> torch.Tensor:
        """Give rows to new ids, free ones first, then those of ids that the policy evicts.

        Args:
            counted_U3: of the ids seen since the last update, ascending: the id, how often, and in which step last.
            step: the step now.

        Returns:
            The rows that have changed hands, ascending.
        """
        ids_U, count_U, last_U = counted_U3.unbind(1)
        by_count_U = torch.argsort(count_U, descending=True, stable=True)
        sorted_U = ids_U[by_count_U]
        place_U = torch.searchsorted(self.ids_S[:-1], sorted_U)
        known_U = self.ids_S[place_U] == sorted_U
        # The policies take and change their metadata in place, and put the new ids' where the evicted ids' was.
        evicted, taken = self._policy.update_metadata_and_generate_eviction_scores(
            step,
            len(self.ids_S),
            by_count_U,
            count_U[by_count_U],
            known_U,
            place_U[known_U],
            self.usage,
            {"last_access_iter": last_U.clone()},
        )
        self.ids_S[evicted] = sorted_U[~known_U][taken]
        changed = self.rows_S[evicted].sort().values
        if len(changed):
            order_S = torch.argsort(self.ids_S, stable=True)  # stable, so that the place kept free stays the last
            self.load({name: values_S[order_S] for name, values_S in self.tensors().items()})
        return changed

    def tensors(self) -> dict[str, torch.Tensor]:
        """The whole state, by name; int64 [S] each."""
        return {"ids": self.ids_S, "rows": self.rows_S, **self.usage}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Become what `tensors` gave."""
        for name, values_S in self.tensors().items():
            values_S.copy_(tensors[name])
        self._index = None

    def frozen(self, step: int) -> IdMap:
        """A copy that later updates do not change."""
        taken_S = self.ids_S != _FREE
        ids_K, rows_K = self.ids_S[taken_S].numpy(), self.rows_S[taken_S].to(torch.int32).numpy()
        return IdMap(ids_K, rows_K, {name: used_S[taken_S].numpy() for name, used_S in self.usage.items()}, step)

    def start_from(self, given: IdMap) -> None:
        """Go on from a map of a table with as many rows."""
        count = len(given.ids_K)
        self.ids_S[:count] = torch.from_numpy(given.ids_K)
        rows_K = torch.from_numpy(given.rows_K).to(torch.int64)
        free_S = torch.ones(FIRST + len(self.rows_S), dtype=torch.bool)
        free_S[:FIRST] = False
        free_S[rows_K] = False
        self.rows_S.copy_(torch.cat([rows_K, free_S.nonzero().flatten()]))
        for name, used_S in self.usage.items():
            used_S[:count] = torch.from_numpy(given.usage[name])
        self._index = None
