"""Batches: the right rows, the same for any number of ranks."""

from itertools import chain

import numpy as np
import pyarrow as pa
import pytest
import torch

from features.batches import Batch, BatchLoader, EncodedRows, Share
from features.errors import InputError

ROWS = 103
LISTS = [list(range(n, n + n % 4)) or [0] for n in range(ROWS)]
TABLE = pa.table(
    {
        "b": pa.array(np.arange(ROWS)),
        "a": pa.array(LISTS, pa.list_(pa.int64())),
        "_label": pa.array((np.arange(ROWS) % 3 == 0).astype(np.float32)),
        "_weight": pa.array((1 + np.arange(ROWS) % 2).astype(np.float32)),
    }
)
NAMES = ("b", "a")


def loader(batch_size: int, rank: int = 0, world: int = 1, seed: int | None = 5) -> BatchLoader:
    return BatchLoader(TABLE, NAMES, batch_size=batch_size, share=Share(rank=rank, world=world), shuffle_seed=seed)


def rows_of(batch: Batch) -> list[int]:
    return batch.ids["b"].values().tolist()


def test_gather_picks_rows_and_keeps_lists_whole() -> None:
    row_B = np.array([7, 0, 102, 7])
    ids = EncodedRows(TABLE, NAMES).gather(row_B)
    assert ids.keys() == ["b", "a"]
    assert ids["b"].values().tolist() == row_B.tolist()
    jagged = ids["a"].to_dense()
    assert [values.tolist() for values in jagged] == [LISTS[row] for row in row_B]


def test_a_sliced_table_with_several_chunks_is_read_right() -> None:
    chunked = pa.concat_tables([TABLE.slice(3, 20), TABLE.slice(50, 7)])
    ids = EncodedRows(chunked, NAMES).gather(np.array([0, 19, 20, 26]))
    assert [values.tolist() for values in ids["a"].to_dense()] == [LISTS[row] for row in (3, 22, 50, 56)]


def test_an_epoch_has_every_row_once_and_another_order_each_time() -> None:
    epochs = [[row for batch in loader(10).epoch(n) for row in rows_of(batch)] for n in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(ROWS))
    assert epochs[0] != epochs[1]
    assert epochs[0] == [row for batch in loader(10).epoch(0) for row in rows_of(batch)]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("batch_size", [32, 51, 102, 1000])
def test_ranks_share_the_same_global_batches(world: int, batch_size: int) -> None:
    ranks = [list(loader(batch_size, rank, world).epoch(0)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    together = [[row for batches in ranks for row in rows_of(batches[i])] for i in range(len(ranks[0]))]
    alone = [row for batch in loader(batch_size).epoch(0) for row in rows_of(batch)]
    assert list(chain.from_iterable(together)) == alone
    assert all(rows_of(batch) for batches in ranks for batch in batches)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_mean_over_ranks_of_weighted_sums_is_the_weighted_mean(world: int) -> None:
    ranks = [list(loader(32, rank, world).epoch(0)) for rank in range(world)]
    alone = list(loader(32).epoch(0))
    for step, whole in enumerate(alone):
        parts = [(batches[step].weight_B * torch.tensor(rows_of(batches[step]))).sum() for batches in ranks]
        rows = np.array(rows_of(whole))
        expected = np.average(rows, weights=1 + rows % 2)
        assert float(sum(parts)) / world == pytest.approx(expected, rel=1e-6)  # weights are fp32


def test_a_small_rest_joins_the_batch_before_it() -> None:
    assert [len(rows_of(batch)) for batch in loader(50).epoch(0)] == [50, 53]
    assert [len(rows_of(batch)) for batch in loader(48).epoch(0)] == [48, 48, 7]


def test_more_processes_than_rows_of_a_batch_are_refused() -> None:
    with pytest.raises(InputError, match="2 processes are too many for batches of 10 out of"):
        loader(10, 0, 2)


def test_without_a_seed_rows_keep_their_order() -> None:
    assert [row for batch in loader(10, seed=None).epoch(3) for row in rows_of(batch)] == list(range(ROWS))


def test_a_batch_moves_as_one() -> None:
    batch = next(loader(8).epoch(0)).to(torch.device("meta"))
    assert {batch.ids.device().type, batch.label_B.device.type, batch.weight_B.device.type} == {"meta"}
