"""Batches: the right rows, the same for any number of ranks."""

from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from features.batches import Batch, EncodedRows
from features.dataset import SplitFiles
from features.errors import InputError
from features.fitting import fit_pipeline
from features.loader import BatchLoader, Share
from features.pipeline import FeaturePipeline
from features.schema import Schema

ROWS = 103
LISTS = [list(range(n, n + n % 4)) or [0] for n in range(ROWS)]
VALUES = [None if n % 7 == 0 else n / 2 for n in range(ROWS)]
TABLE = pa.table(
    {
        "b": pa.array(np.arange(ROWS), pa.int32()),
        "v": pa.array(VALUES, pa.float32()),
        "a": pa.array(LISTS, pa.list_(pa.int32())),
        "p": pa.array(np.full(ROWS, 4), pa.int32()),
        "_label": pa.array((np.arange(ROWS) % 3 == 0).astype(np.float32)),
        "_weight": pa.array((1 + np.arange(ROWS) % 2).astype(np.float32)),
    }
)


def pipeline(unknown_rate: float = 0.0) -> FeaturePipeline:
    fields = [
        {"name": "b", "type": "categorical", "encoder": "identity", "buckets": ROWS, "unknown_rate": unknown_rate},
        {"name": "v", "type": "numeric", "encoder": "log1p"},
        {"name": "a", "type": "list", "encoder": "identity", "buckets": ROWS, "unknown_rate": unknown_rate / 2},
        {"name": "p", "type": "categorical", "encoder": "identity", "buckets": 9, "training_only": {"default": 5}},
    ]
    schema = Schema.model_validate({"name": "t", "label": {"column": "y"}, "fields": fields})
    return fit_pipeline(schema, {"b": [1], "v": [1.0], "a": [["1"]], "p": [1]})


PIPELINE = pipeline()


@pytest.fixture(scope="session")
def split(tmp_path_factory: pytest.TempPathFactory) -> SplitFiles:
    """The table in two files of several row groups each."""
    folder = tmp_path_factory.mktemp("split")
    for index, part in enumerate((TABLE.slice(0, 40), TABLE.slice(40))):
        pq.write_table(part, folder / f"part-{index}.parquet", row_group_size=9)
    return SplitFiles(sorted(folder.iterdir()))


def loader(
    split: SplitFiles,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    seed: int | None = 5,
    buffer_rows: int = 30,
    with_pipeline: FeaturePipeline = PIPELINE,
) -> BatchLoader:
    share = Share(rank=rank, world=world)
    options = {"batch_size": batch_size, "share": share, "shuffle_seed": seed, "buffer_rows": buffer_rows}
    return BatchLoader(split, with_pipeline, **options)  # type: ignore[arg-type]


def rows_of(batch: Batch) -> list[int]:
    return batch.ids["b"].values().tolist()


def test_gather_picks_rows_and_keeps_lists_whole() -> None:
    row_B = np.array([7, 0, 102, 7])
    ids, values_BV, missing_BV = EncodedRows.of(TABLE, PIPELINE.layout).gather(row_B)
    assert ids.keys() == ["b", "a", "p"]
    assert ids["b"].values().tolist() == row_B.tolist()
    jagged = ids["a"].to_dense()
    assert [values.tolist() for values in jagged] == [LISTS[row] for row in row_B]
    assert values_BV.tolist() == [[0.0], [0.0], [51.0], [0.0]]
    assert missing_BV.tolist() == [[1.0], [1.0], [0.0], [1.0]]


def test_a_sliced_table_with_several_chunks_is_read_right() -> None:
    chunked = pa.concat_tables([TABLE.slice(3, 20), TABLE.slice(50, 7)])
    ids, _, _ = EncodedRows.of(chunked, PIPELINE.layout).gather(np.array([0, 19, 20, 26]))
    assert [values.tolist() for values in ids["a"].to_dense()] == [LISTS[row] for row in (3, 22, 50, 56)]


def test_an_epoch_has_every_row_once_and_another_order_each_time(split: SplitFiles) -> None:
    epochs = [[row for batch in loader(split, 10).epoch(n) for row in rows_of(batch)] for n in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(ROWS))
    assert epochs[0] != epochs[1]
    assert epochs[0] == [row for batch in loader(split, 10).epoch(0) for row in rows_of(batch)]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("batch_size", [32, 51, 102, 1000])
def test_ranks_share_the_same_global_batches(split: SplitFiles, world: int, batch_size: int) -> None:
    ranks = [list(loader(split, batch_size, rank, world).epoch(0)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    together = [[row for batches in ranks for row in rows_of(batches[i])] for i in range(len(ranks[0]))]
    alone = [row for batch in loader(split, batch_size).epoch(0) for row in rows_of(batch)]
    assert list(chain.from_iterable(together)) == alone
    assert all(rows_of(batch) for batches in ranks for batch in batches)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_mean_over_ranks_of_weighted_sums_is_the_weighted_mean(split: SplitFiles, world: int) -> None:
    ranks = [list(loader(split, 32, rank, world).epoch(0)) for rank in range(world)]
    alone = list(loader(split, 32).epoch(0))
    for step, whole in enumerate(alone):
        parts = [(batches[step].weight_B * torch.tensor(rows_of(batches[step]))).sum() for batches in ranks]
        rows = np.array(rows_of(whole))
        expected = np.average(rows, weights=1 + rows % 2)
        assert float(sum(parts)) / world == pytest.approx(expected, rel=1e-6)  # weights are fp32


def test_a_small_rest_joins_the_batch_before_it(split: SplitFiles) -> None:
    assert [len(rows_of(batch)) for batch in loader(split, 50).epoch(0)] == [50, 53]
    assert [len(rows_of(batch)) for batch in loader(split, 48).epoch(0)] == [48, 48, 7]


def test_more_processes_than_rows_of_a_batch_are_refused(split: SplitFiles) -> None:
    with pytest.raises(InputError, match="2 processes are too many for batches of 10 out of"):
        loader(split, 10, 0, 2)


def test_without_a_seed_rows_keep_their_order(split: SplitFiles) -> None:
    assert [row for batch in loader(split, 10, seed=None).epoch(3) for row in rows_of(batch)] == list(range(ROWS))


def test_a_batch_moves_as_one(split: SplitFiles) -> None:
    batch = next(loader(split, 8).epoch(0)).to(torch.device("meta"))
    assert {batch.ids.device().type, batch.label_B.device.type, batch.weight_B.device.type} == {"meta"}


@pytest.mark.parametrize("buffer_rows", [1, 30, 1000])
def test_every_part_of_a_batch_belongs_to_the_same_row(split: SplitFiles, buffer_rows: int) -> None:
    for batch in loader(split, 17, buffer_rows=buffer_rows).epoch(2):
        rows = rows_of(batch)
        assert [values.tolist() for values in batch.ids["a"].to_dense()] == [LISTS[row] for row in rows]
        assert batch.values_BV[:, 0].tolist() == [VALUES[row] or 0.0 for row in rows]
        assert batch.missing_BV[:, 0].tolist() == [float(VALUES[row] is None) for row in rows]
        assert batch.label_B.tolist() == [float(row % 3 == 0) for row in rows]


@pytest.mark.parametrize("buffer_rows", [1, 30, 1000])
@pytest.mark.parametrize("batch_size", [7, 24, 60])
def test_an_epoch_goes_on_at_any_step(split: SplitFiles, batch_size: int, buffer_rows: int) -> None:
    whole = [rows_of(batch) for batch in loader(split, batch_size, buffer_rows=buffer_rows).epoch(1)]
    for first in range(len(whole) + 1):
        rest = loader(split, batch_size, buffer_rows=buffer_rows).epoch(1, first_step=first)
        assert [rows_of(batch) for batch in rest] == whole[first:]


def test_shuffling_mixes_within_a_buffer_and_the_order_of_buffers(split: SplitFiles) -> None:
    rows = np.array([row for batch in loader(split, 10, buffer_rows=18).epoch(0) for row in rows_of(batch)])
    assert (np.diff(rows) == 1).mean() < 0.2
    assert sorted(rows[:30].tolist()) != list(range(30))


def test_hidden_ids_are_a_share_of_the_field_and_other_ones_in_each_epoch(tmp_path: Path) -> None:
    many = pa.concat_tables([TABLE] * 40)
    pq.write_table(many, tmp_path / "part.parquet")
    files, hiding = SplitFiles([tmp_path / "part.parquet"]), pipeline(unknown_rate=0.25)
    epochs = []
    for number in (0, 0, 1):
        batches = list(loader(files, 500, buffer_rows=3000, with_pipeline=hiding).epoch(number))
        ids = [torch.cat([batch.ids[name].values() for batch in batches]).numpy() for name in ("b", "a")]
        # 4,120 draws at .25 have a standard deviation of .0067; of the table's own rows, 1 in 103 has the id 1
        assert abs((ids[0] == 1).mean() - 0.25) < 0.04
        assert abs((ids[1] == 1).mean() - 0.125) < 0.04
        epochs.append(ids[0].tolist())
    assert epochs[0] == epochs[1] != epochs[2]


def test_validation_sees_what_serving_sees(split: SplitFiles) -> None:
    shown = [batch.ids["p"].values().tolist() for batch in loader(split, 50, seed=None).epoch(0)]
    assert set(chain.from_iterable(shown)) == {7}  # the default 5
    trained = [batch.ids["p"].values().tolist() for batch in loader(split, 50).epoch(0)]
    assert set(chain.from_iterable(trained)) == {4}


def test_an_error_in_the_loaders_thread_reaches_the_caller(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "part.parquet")
    files = SplitFiles([tmp_path / "part.parquet"])
    (tmp_path / "part.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"part\.parquet is damaged"):
        next(loader(files, 10).epoch(0))
    with pytest.raises(InputError, match=r"part\.parquet is damaged"):
        SplitFiles([tmp_path / "part.parquet"])


def test_a_damaged_row_group_is_named_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(TABLE, path, row_group_size=20)
    files, group = SplitFiles([path]), pq.read_metadata(path).row_group(2)
    whole = bytearray(path.read_bytes())
    start = group.column(0).dictionary_page_offset or group.column(0).data_page_offset
    whole[start : start + 40] = b"\xff" * 40
    path.write_bytes(whole)
    assert files.read(files.row_groups[1], ["a"]).num_rows == 20
    with pytest.raises(InputError, match=rf"row group 2 of {path} is damaged"):
        list(loader(files, 10).epoch(0))
