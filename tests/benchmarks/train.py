"""Samples per second of training, and how many times that is of what plain PyTorch does.

    python -m tests.benchmarks.train [--ids N ...] [--turns N] [--steps N] [--work DIR]

26 categorical fields × 16, 3 parallel blocks × 400, r = 2, head 400, 400, batches of 4,096. Ids are drawn evenly from
tables that have 1 M and 10 M rows together: the hardest case for caches. All take turns of so many steps in this
process; a step is loading, forward, backward and both optimizers. Ratios are of one turn each, so that they share what
else the machine was doing. Batches that were made ahead during another one's turn are 4 of a turn's at most.

ours bf16, ours fp32   `masknet train`'s parts: BatchLoader from Parquet, sharded tables with fused row-wise Adagrad,
                       Adam, gradient clipping, TorchRec's pipeline.
(a) plain              Public code's shape: an embedding and a layer norm per field, Adam over everything, rows from
                       memory one by one in a worker process (`rivals/torch_masknets.py`).
(b) strong fp32        One embedding with sparse Adagrad, norms at once, fused Adam, oneDNN, whole batches from memory.
(c) strong bf16        The same under autocast.

The losses of the first steps of ours in fp32 and of (b), from the same weights on the same batches with Adagrad per
weight, are compared too: they must differ by no more than `TOLERANCE` times what (b) differs from itself, MKL for
oneDNN.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from features.allocator import keep_freed_memory
from features.batches import Batch
from features.dataset import LABEL, PreparedDataset
from features.loader import BatchLoader
from masknet.model import Table, initial_rows
from serving.bundle import fields_of, tables_of
from tests.benchmarks.common import measured, write_result
from tests.benchmarks.rivals.torch_masknets import Plain, Shape, Strong, plain_batches, strong_batches
from training.bench.train_data import make_data
from training.bench.trainer import Trainer, bench_config
from training.config import Config
from training.distributed import World, join_world

FIELDS, BATCH, ROWS = 26, 4096, 600_000
LR, COMPARED = 0.02, 20
SEED = 1  # the configuration's
# Of the difference that (b) has to itself by another library of products. Rounding alone makes it: the first steps of
# Adam and Adagrad, g / √g², turn the sign of a gradient near 0 into a whole step, and from there losses part.
TOLERANCE = 3.0

Turn = Callable[[int], None]


def shape_of(config: Config, data: PreparedDataset) -> Shape:
    """The rivals' shape, with tables as large as ours."""
    model = config.model
    rows = tables_of(data.pipeline)[0].rows
    return Shape(FIELDS, rows, model.embedding_dim, model.blocks, model.block_width, 2, model.head)


def ours(config: Config, data: PreparedDataset, world: World) -> Turn:
    """A turn of `masknet train`'s parts."""
    trainer = Trainer(config, tables_of(data.pipeline), fields_of(data.pipeline), world)
    loader = BatchLoader(data.files("train"), data.pipeline, batch_size=BATCH, shuffle_seed=1)

    def batches() -> Iterator[Batch]:
        for epoch in range(10**6):
            yield from loader.epoch(epoch)

    stream = batches()

    def turn(steps: int) -> None:
        for _ in range(steps):
            trainer.step(stream)

    return turn


def contenders(ids: int, data: PreparedDataset, world: World) -> dict[str, Turn]:
    """What takes turns."""
    table = data.split("train")
    ids_NF = torch.from_numpy(np.stack([table[name].to_numpy() for name in data.pipeline.layout.ids], 1)).long()
    label_N = torch.from_numpy(table[LABEL].to_numpy().astype(np.float32))
    config = bench_config(precision="bf16")
    shape = shape_of(config, data)
    torch.manual_seed(0)
    plain, by_row = Plain(shape), plain_batches(ids_NF, label_N, BATCH)
    strong = {bf16: Strong(shape, bf16=bf16, sparse_lr=LR) for bf16 in (False, True)}
    at_once = {bf16: strong_batches(ids_NF, label_N, BATCH) for bf16 in (False, True)}

    def rival(step: Callable[..., float], batches: Iterator[Any]) -> Turn:
        def turn(steps: int) -> None:
            for _ in range(steps):
                step(*next(batches))

        return turn

    return {
        "ours bf16": ours(config, data, world),
        "ours fp32": ours(bench_config(precision="fp32"), data, world),
        "(a) plain": rival(plain.step, by_row),
        "(b) strong fp32": rival(strong[False].step, at_once[False]),
        "(c) strong bf16": rival(strong[True].step, at_once[True]),
    }


def compare_speeds(ids: int, data: PreparedDataset, turns: int, steps: int) -> list[dict[str, Any]]:
    """Rows of samples/s and of ratios."""
    with join_world() as world:
        ways = contenders(ids, data, world)
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(turns + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way(steps)
                if turn:  # the first one warms up
                    speeds[name].append(steps * BATCH / (time.perf_counter() - start))
            if turn:
                told = ", ".join(f"{name} {found[-1]:,.0f}" for name, found in speeds.items())
                print(f"{ids:,} ids, turn {turn} of {turns}, samples/s: {told}", flush=True)
        rows = [measured(f"{name}, {ids:,} ids", found, "samples/s", ids=ids) for name, found in speeds.items()]
        for mine in ("ours bf16", "ours fp32"):
            for rival in ("(a) plain", "(b) strong fp32", "(c) strong bf16"):
                ratios = [a / b for a, b in zip(speeds[mine], speeds[rival], strict=True)]
                rows.append(measured(f"{mine} over {rival}, {ids:,} ids", ratios, "ratio", ids=ids))
        return rows


def compare_losses(data: PreparedDataset) -> list[dict[str, Any]]:
    """Relative differences between the losses of ours in fp32 and of (b), and of (b) by oneDNN and by MKL."""
    config = bench_config(precision="fp32", sparse="adagrad", sparse_lr=LR)
    tables, fields = tables_of(data.pipeline), fields_of(data.pipeline)
    losses: list[tuple[float, float, float]] = []
    with join_world() as world:
        trainer = Trainer(config, tables, fields, world)
        shape = shape_of(config, data)
        rivals = [Strong(shape, bf16=False, sparse_lr=LR, onednn=onednn) for onednn in (True, False)]
        for rival in rivals:
            _copy_weights(trainer, tables, rival)
        loader = BatchLoader(data.files("train"), data.pipeline, batch_size=BATCH)
        for batch, same in islice(zip(loader.epoch(0), loader.epoch(0), strict=True), COMPARED):
            ids_BF = same.ids.values().view(FIELDS, -1).t().contiguous()
            theirs, rounded = (rival.step(ids_BF, same.label_B) for rival in rivals)
            losses.append((float(trainer.step(iter([batch])).loss), theirs, rounded))
    ours_S, theirs_S, rounded_S = np.array(losses).T
    apart, noise = abs(ours_S - theirs_S) / theirs_S, abs(rounded_S - theirs_S) / theirs_S
    assert apart.max() <= TOLERANCE * noise.max(), (apart, noise)
    return [
        measured("loss, ours fp32 and (b), relative difference", list(apart), "1", worst=float(f"{apart.max():.2g}")),
        measured("loss, (b) by oneDNN and by MKL, likewise", list(noise), "1", worst=float(f"{noise.max():.2g}")),
    ]


@torch.no_grad()
def _copy_weights(trainer: Trainer, tables: tuple[Table, ...], rival: Strong) -> None:
    network, dim = trainer.model.network, rival.table.embedding_dim
    for index, table in enumerate(tables):
        rows = initial_rows(table, dim, SEED)
        rival.table.weight[index * len(rows) : (index + 1) * len(rows)] = rows
    theirs = [rival.scale, rival.shift, *rival.dense.parameters()]  # in the order of ours
    for target, source in zip(theirs, network.parameters(), strict=True):
        assert target.shape == source.shape
        target.copy_(source)


def main() -> None:
    """Measure and write results/train.json."""
    parser = argparse.ArgumentParser(description="Samples per second of training, ours and plain PyTorch's.")
    parser.add_argument("--ids", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--steps", type=int, default=16, help="of one turn")
    parser.add_argument("--work", type=Path, help="folder for temporary files; by default the system's")
    options = parser.parse_args()
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        for number, ids in enumerate(options.ids):
            data = make_data(Path(work), fields=FIELDS, ids=ids, rows=ROWS)
            if number == 0:
                rows += compare_losses(data)
            rows += compare_speeds(ids, data, options.turns, options.steps)
            gc.collect()
    facts = {"fields": FIELDS, "batch_size": BATCH, "data_rows": ROWS, "threads": torch.get_num_threads()}
    write_result("train", {**facts, "steps_per_turn": options.steps, "rows": rows})


if __name__ == "__main__":
    main()
