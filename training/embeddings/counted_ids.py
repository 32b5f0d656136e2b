"""How often each managed id was seen, and when last, since the map was updated; over all ranks.

Legend: U distinct ids; 3 columns: the id, how often it was seen, the step in which it was seen last.
"""

import torch

from features.encoders import FIRST
from features.id_maps import IdsN
from training.distributed import World, concat_over_ranks

_PENDING = 4_000_000  # ids that are held as they came before they are counted


class CountedIds:
    """Counts of one table's ids on this rank."""

    def __init__(self) -> None:
        self.clear()

    def add(self, ids_N: IdsN, step: int) -> None:
        """Count ids [N], of which missing and never seen do not count."""
        ids = torch.from_numpy(ids_N[ids_N >= FIRST])
        self._pending.append(torch.stack([ids, torch.ones_like(ids), torch.full_like(ids, step)], 1))
        self._size += len(ids)
        if self._size > _PENDING:
            self._merge()

    def clear(self) -> None:
        """Begin anew."""
        self.replace(torch.empty(0, 3, dtype=torch.int64))

    def replace(self, counted_U3: torch.Tensor) -> None:
        """Go on from what `over_ranks` gave."""
        self._counted_U3 = counted_U3.clone()
        self._pending: list[torch.Tensor] = []
        self._size = 0

    def over_ranks(self, world: World) -> torch.Tensor:
        """All ranks' counts together [U, 3], ids ascending, the same on every rank; every rank must call this."""
        self._merge()
        if world.size == 1:
            return self._counted_U3
        together = concat_over_ranks(self._counted_U3.flatten().to(world.device)).cpu()
        return _summed(together.view(-1, 3))

    def _merge(self) -> None:
        self._counted_U3 = _summed(torch.cat([self._counted_U3, *self._pending]))
        self._pending, self._size = [], 0


def _summed(seen_N3: torch.Tensor) -> torch.Tensor:
    """Each id once, with the sum of its counts and the latest of its steps."""
    id_N, count_N, step_N = seen_N3.unbind(1)
    id_U, place_N = torch.unique(id_N, return_inverse=True)
    count_U = torch.zeros_like(id_U).index_add_(0, place_N, count_N)
    last_U = torch.zeros_like(id_U).scatter_reduce_(0, place_N, step_N, "amax")
    return torch.stack([id_U, count_U, last_U], 1)
