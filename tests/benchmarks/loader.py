"""Rows per second of an epoch of batches, from `BatchLoader` and from PyTorch's `DataLoader`.

    python -m tests.benchmarks.loader [--rows N] [--epochs N] [--work DIR]

A synthetic Criteo file (39 fields with ids) is prepared once, all of it as the training split. Then the loaders take
turns, an epoch each, in this process. Every batch has 4,096 rows and is a KeyedJaggedTensor of 64-bit ids with labels
and weights; nothing is computed with it.

BatchLoader, shuffled and in order   Timed: reading and decoding Parquet, shuffling, gathering, building the batches.
DataLoader, row by row               `DataLoader(TensorDataset, batch_size=4096, shuffle=True, num_workers=0)`.
DataLoader, batch by batch           The same with whole batches indexed at once (`BatchSampler` as the sampler), the
                                     fastest that its documentation describes for tensors in memory.

The rivals' data are in memory before the clock starts, ids as 64-bit integers [N, 39], so they read no file. Not timed:
the preparation, and the check of the data set's hashes, which training does once.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.batches import Batch
from features.dataset import LABEL, WEIGHT, PreparedDataset
from features.loader import BatchLoader
from features.prepare import prepare
from features.schema import load_schema
from features.synthetic import write_criteo
from tests.benchmarks.common import SCHEMA, measured, write_result

BATCH = 4096
Epoch = Callable[[int], Iterator[Batch]]


def make_data(rows: int, work: Path) -> PreparedDataset:
    """A prepared data set that is all training split."""
    raw = work / "raw.tsv"
    write_criteo(raw, rows)
    prepare(load_schema(SCHEMA), {"train": [str(raw)]}, work / "data")
    raw.unlink()
    return PreparedDataset.open(work / "data")


def in_memory(table: pa.Table, names: tuple[str, ...]) -> TensorDataset:
    """Ids [N, F], labels and weights as tensors."""
    ids_NF = torch.from_numpy(np.stack([table[name].to_numpy().astype(np.int64) for name in names], axis=1))
    return TensorDataset(
        ids_NF, *(torch.tensor(table[name].to_numpy(), dtype=torch.float32) for name in (LABEL, WEIGHT))
    )


def rival_epoch(loader: "DataLoader[tuple[torch.Tensor, ...]]", names: list[str], number: int) -> Iterator[Batch]:
    """The batches of a DataLoader as ours are."""
    torch.manual_seed(number)
    for ids_BF, label_B, weight_B in loader:
        lengths = torch.ones(ids_BF.numel(), dtype=torch.int32)
        ids = KeyedJaggedTensor(names, ids_BF.t().flatten(), lengths=lengths)
        none = torch.empty(len(label_B), 0)
        yield Batch(ids, none, none, label_B, weight_B / weight_B.sum())


def rows_per_second(epoch: Epoch, number: int, rows: int) -> float:
    """The speed of one epoch, which must bring all rows."""
    start = time.perf_counter()
    seen = sum(len(batch.label_B) for batch in epoch(number))
    seconds = time.perf_counter() - start
    assert seen == rows
    return rows / seconds


def main() -> None:
    """Measure and write results/loader.json."""
    parser = argparse.ArgumentParser(description="Rows per second of batches for training.")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for temporary files; by default the system's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        data = make_data(options.rows, Path(work))
        names = data.pipeline.layout.ids
        memory = in_memory(data.split("train"), names)
        files = data.files("train")
        by_row = DataLoader(memory, batch_size=BATCH, shuffle=True, num_workers=0)
        by_batch = DataLoader(memory, sampler=BatchSampler(RandomSampler(memory), BATCH, False), batch_size=None)
        ways: dict[str, Epoch] = {
            "BatchLoader, shuffled": BatchLoader(files, data.pipeline, batch_size=BATCH, shuffle_seed=1).epoch,
            "BatchLoader, in order": BatchLoader(files, data.pipeline, batch_size=BATCH).epoch,
            "DataLoader, row by row": partial(rival_epoch, by_row, list(names)),
            "DataLoader, batch by batch": partial(rival_epoch, by_batch, list(names)),
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.epochs):
            for name, epoch in ways.items():
                speeds[name].append(rows_per_second(epoch, number, options.rows))
            told = ", ".join(f"{name} {found[-1]:,.0f} rows/s" for name, found in speeds.items())
            print(f"epoch {number + 1} of {options.epochs}: {told}", flush=True)
    rows = [measured(name, found, "rows/s") for name, found in speeds.items()]
    facts = {"data_rows": options.rows, "batch_size": BATCH, "fields": len(names), "threads": torch.get_num_threads()}
    write_result("loader", {**facts, "rows": rows})


if __name__ == "__main__":
    main()
