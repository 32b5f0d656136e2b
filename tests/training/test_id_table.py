"""Which ids get rows: by hand, and beside TorchRec's own module on the same stream of ids.

Legend: N ids of a step.
"""

import numpy as np
import pytest
import torch
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import JaggedTensor

from features.id_maps import IdsN
from training.distributed import World
from training.embeddings.counted_ids import CountedIds
from training.embeddings.id_table import IdTable

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
EVERY = 4  # steps between updates
POLICIES = {"lfu": LFU_EvictionPolicy, "lru": LRU_EvictionPolicy, "distance_lfu": DistanceLFU_EvictionPolicy}


def seen(*steps: list[int], first: int = 1) -> torch.Tensor:
    """Counts of the ids of some steps, of which the first has the number `first`."""
    counted = CountedIds()
    for step, ids in enumerate(steps, first):
        counted.add(np.array(ids, np.int64), step)
    return counted.over_ranks(ALONE)


def rows_of(table: IdTable, *ids: int) -> list[int]:
    return table.rows(np.array(ids, np.int64)).tolist()


def stream(steps: int) -> list[IdsN]:
    """Ids of which the frequent ones change in time, too many for the table."""
    random = np.random.default_rng(7)
    hashes = random.permutation(np.unique(random.integers(2, 2**63 - 2, 400)))
    return [hashes[np.minimum(random.zipf(1.3, 64) + 20 * (step // EVERY), len(hashes) - 1)] for step in range(steps)]


@pytest.mark.parametrize("eviction", POLICIES)
def test_the_map_is_that_of_torchrecs_module(eviction: str) -> None:
    table, counted = IdTable(42, eviction), CountedIds()
    module = MCHManagedCollisionModule(
        zch_size=41,
        device=torch.device("cpu"),
        eviction_policy=POLICIES[eviction](),
        eviction_interval=EVERY,
        output_global_offset=2,
    )
    evicted = 0
    for step, ids_N in enumerate(stream(48), 1):
        module({"f": JaggedTensor(torch.from_numpy(ids_N), lengths=torch.tensor([len(ids_N)]))})
        counted.add(ids_N, step)
        if step % EVERY:
            continue
        before = dict(zip(table.ids_S.tolist(), table.rows_S.tolist(), strict=True))
        changed = table.update(counted.over_ranks(ALONE), step)
        counted.clear()
        theirs = module.remap({"f": JaggedTensor(torch.from_numpy(ids_N), lengths=torch.tensor([len(ids_N)]))})
        expected_N = theirs["f"].values().numpy()
        # TorchRec sends ids without a row to the last one, which is row 42 here, and beyond the table
        assert table.rows(ids_N).tolist() == np.where(expected_N == 42, 1, expected_N).tolist()
        torch.testing.assert_close(table.ids_S, module.get_buffer("_mch_sorted_raw_ids"), rtol=0, atol=0)
        torch.testing.assert_close(table.rows_S, module.get_buffer("_mch_remapped_ids_mapping"), rtol=0, atol=0)
        after = dict(zip(table.ids_S.tolist(), table.rows_S.tolist(), strict=True))
        assert changed.tolist() == sorted(row for id_, row in after.items() if before.get(id_) != row and row < 42)
        evicted += len(before.keys() - after.keys())
    assert evicted > 40


def test_free_rows_are_given_first_and_most_frequent_ids_first() -> None:
    table = IdTable(5, "lfu")
    assert rows_of(table, 0, 1, 50) == [0, 1, 1]
    changed = table.update(seen([50, 60, 60, 0, 1, 1, 1]), 1)  # missing and never seen ask for nothing
    assert changed.tolist() == [3, 4]
    assert sorted(rows_of(table, 50, 60)) == [3, 4]
    assert table.update(seen([70, 70, 80], first=2), 2).tolist() == [2]  # one row is left
    assert rows_of(table, 70, 80) == [2, 1]


def test_least_frequent_ids_lose_their_rows() -> None:
    table = IdTable(5, "lfu")
    table.update(seen([50, 50, 50, 60, 60, 70]), 1)
    (row,) = rows_of(table, 70)
    assert table.update(seen([80], first=2), 2).tolist() == []  # as rare as 70, which stays
    assert table.update(seen([80, 80, 90], first=3), 3).tolist() == [row]
    assert rows_of(table, 80, 70, 90) == [row, 1, 1]
    assert rows_of(table, 50, 60) != [1, 1]


def test_ids_not_seen_for_longest_lose_their_rows_however_frequent() -> None:
    table = IdTable(5, "lru")
    table.update(seen([50] * 9, [60], [70]), 3)
    (row,) = rows_of(table, 50)
    assert table.update(seen([60, 80], first=4), 4).tolist() == [row]
    assert rows_of(table, 80, 50) == [row, 1]


def test_a_count_long_ago_is_worth_less_than_a_smaller_one_now() -> None:
    table = IdTable(4, "distance_lfu")
    table.update(seen([50] * 4, [60] * 4), 2)  # 4 / (2 - 1 + 1) and 4 / 1
    (row,) = rows_of(table, 50)
    assert table.update(seen([60], [], [80], first=3), 5).tolist() == [row]  # 4 / 5 < 1 / 1 < 5 / 3
    assert rows_of(table, 50, 80) == [1, row]
    assert rows_of(table, 60) != [1]


def test_counts_add_up_over_steps_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = seen([7, 5, 7], [5], [9, 9, 9], [7])
    assert whole.tolist() == [[5, 2, 2], [7, 3, 4], [9, 3, 3]]
    monkeypatch.setattr("training.embeddings.counted_ids._PENDING", 2)
    assert seen([7, 5, 7], [5], [9, 9, 9], [7]).tolist() == whole.tolist()


@pytest.mark.parametrize("eviction", POLICIES)
def test_a_frozen_map_goes_on_as_the_table_would_have(eviction: str) -> None:
    table, steps = IdTable(30, eviction), stream(12)
    for number in (1, 2):
        table.update(
            seen(*(ids.tolist() for ids in steps[4 * number - 4 : 4 * number]), first=4 * number - 3), 4 * number
        )
    frozen = table.frozen(8)
    frozen.require_rows_below(30, "map")
    assert (frozen.ids_K[1:] > frozen.ids_K[:-1]).all()
    again = IdTable(30, eviction)
    again.start_from(frozen)
    last = seen(*(ids.tolist() for ids in steps[8:]), first=9)
    assert table.update(last, 12).tolist() == again.update(last, 12).tolist()
    for ids_N in steps:
        assert table.rows(ids_N).tolist() == again.rows(ids_N).tolist()
    assert frozen.rows(steps[0]).tolist() != table.rows(steps[0]).tolist()  # a copy: what came later is not in it


def test_a_map_with_free_rows_goes_on_with_those() -> None:
    table = IdTable(6, "lfu")
    table.update(seen([50, 60, 60]), 1)
    again = IdTable(6, "lfu")
    again.start_from(table.frozen(1))
    assert again.update(seen([70, 70, 80], first=2), 2).tolist() == [2, 3]
    assert rows_of(again, 50, 60) == rows_of(table, 50, 60)
