"""A split's rows in batches: streamed from Parquet, shuffled, the same order whatever the number of ranks.

Legend: G rows of a global batch, B rows of this rank's share of it.
"""

import atexit
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from features.batches import Batch, EncodedRows
from features.dataset import LABEL, WEIGHT, RowGroup, SplitFiles
from features.encoders import UNKNOWN
from features.errors import InputError
from features.pipeline import FeaturePipeline

BUFFER_ROWS = 262_144  # rows in memory that are shuffled together
AHEAD = 4  # batches made ahead of the one in use
THREAD = "masknet-loader"
_PARTS = 8  # an epoch's last batch is at least this part of a whole one

T = TypeVar("T")
_running: dict[threading.Thread, threading.Event] = {}  # threads that make something, and what stops them


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of every global batch is this process's."""

    rank: int = 0
    world: int = 1


@dataclass
class _Buffer:
    """Decoded rows, the order in which they are used, and where in the epoch they begin."""

    rows: EncodedRows
    label_N: npt.NDArray[np.float32]
    weight_N: npt.NDArray[np.float64]
    order: npt.NDArray[np.int64]
    start: int


class BatchLoader:
    """Cuts a split into global batches and gives one rank its contiguous share of each.

    Row groups are taken in an order drawn from seed and epoch, BUFFER_ROWS of them at a time are decoded and shuffled
    together; a split that is smaller is shuffled whole. The order depends on the data, the seed and the epoch only, so
    training does not depend on the number of ranks; every rank decodes all rows and gathers its own. The weights of a
    global batch are scaled to add up to the number of ranks: then the mean over ranks of each rank's Σ weight · loss is
    the batch's weighted mean loss, even where the last batch divides unevenly.
    """

    def __init__(
        self,
        split: SplitFiles,
        pipeline: FeaturePipeline,
        *,
        batch_size: int,
        share: Share | None = None,
        shuffle_seed: int | None = None,
        buffer_rows: int = BUFFER_ROWS,
    ) -> None:
        """Plan a split's batches; nothing is read yet.

        Args:
            split: the files of an encoded split.
            pipeline: what has encoded it. Where its fields have an unknown_rate, shuffled batches hide ids; where they
                are training_only, batches in the rows' own order (validation) hold what serving sees.
            batch_size: rows of a global batch, over all ranks.
            share: which part of it is this process's; by default all.
            shuffle_seed: None keeps the rows' order.
            buffer_rows: rows that are shuffled together.

        Raises:
            InputError: some rank would have no rows.
        """
        self.split, self._pipeline = split, pipeline
        self._share = share or Share()
        self._seed, self._buffer_rows = shuffle_seed, buffer_rows
        self.num_rows = split.num_rows
        if self._share.world > 1 and min(batch_size // _PARTS, self.num_rows) < self._share.world:
            raise InputError(
                f"{self._share.world} processes are too many for batches of {batch_size} out of "
                f"{self.num_rows} rows: a batch needs {_PARTS} rows per process"
            )
        whole, rest = divmod(self.num_rows, batch_size)
        # A small rest joins the batch before it: then every rank has rows in every step, and no step is mostly noise.
        # Not by the number of ranks, or the steps would depend on it.
        merged = whole > 0 and 0 < rest * _PARTS < batch_size
        self._ends = [batch_size * (i + 1) for i in range(whole - merged)] + ([self.num_rows] if rest else [])

    def __len__(self) -> int:
        """Steps per epoch."""
        return len(self._ends)

    def epoch(self, number: int, first_step: int = 0) -> Generator[Batch, None, None]:
        """This rank's batches of an epoch, from `first_step` on; decoding runs ahead in threads that end with it."""
        return _ahead(lambda: self._batches(number, first_step), AHEAD)

    def _batches(self, epoch: int, first_step: int) -> Generator[Batch, None, None]:
        starts = [0, *self._ends]
        if first_step >= len(self._ends):
            return
        with closing(_ahead(lambda: self._buffers(epoch, starts[first_step]), 1)) as buffers:
            buffer = next(buffers)
            for start, end in zip(starts[first_step:], self._ends[first_step:], strict=False):
                while end > buffer.start + len(buffer.order):
                    buffer = _joined(buffer, start, next(buffers))
                yield self._batch(buffer, buffer.order[start - buffer.start : end - buffer.start])

    def _buffers(self, epoch: int, position: int) -> Generator[_Buffer, None, None]:
        """Decoded buffers from the one that holds the row at `position` of the epoch's order."""
        start = 0
        for index, groups in enumerate(self._grouped(epoch)):
            rows = sum(group.rows for group in groups)
            if start + rows > position:
                yield self._decode(groups, epoch, index, start)
            start += rows

    def _grouped(self, epoch: int) -> Iterator[list[RowGroup]]:
        groups = self.split.row_groups
        if self._seed is not None:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(groups))
            groups = [groups[index] for index in order]
        held: list[RowGroup] = []
        rows = 0
        for group in groups:
            held.append(group)
            rows += group.rows
            if rows >= self._buffer_rows:
                yield held
                held, rows = [], 0
        if held:
            yield held

    def _decode(self, groups: list[RowGroup], epoch: int, index: int, start: int) -> _Buffer:
        names = [*self._pipeline.names, LABEL, WEIGHT]
        table = pa.concat_tables([self.split.read(group, names) for group in groups])
        if self._seed is None:
            rows, order = self._rows(self._pipeline.as_served(table)), np.arange(table.num_rows)
        else:
            random = np.random.default_rng((self._seed, epoch, index))
            rows, order = self._rows(table), random.permutation(table.num_rows)
            for name, rate in self._pipeline.hidden.items():
                rows.hide(name, rate, UNKNOWN, random)
        label_N = table[LABEL].to_numpy().astype(np.float32)
        return _Buffer(rows, label_N, table[WEIGHT].to_numpy().astype(np.float64), order, start)

    def _rows(self, table: pa.Table) -> EncodedRows:
        return EncodedRows.of(table, self._pipeline.layout)

    def _batch(self, buffer: _Buffer, row_G: npt.NDArray[np.int64]) -> Batch:
        rank, world = self._share.rank, self._share.world
        row_B = row_G[len(row_G) * rank // world : len(row_G) * (rank + 1) // world]
        total = buffer.weight_N[row_G].sum()
        scale = world / total if total > 0 else 0.0
        label_B = torch.from_numpy(buffer.label_N[row_B])
        weight_B = torch.from_numpy((buffer.weight_N[row_B] * scale).astype(np.float32))
        batch = Batch(*buffer.rows.gather(row_B), label_B, weight_B)
        return batch.pin_memory() if torch.cuda.is_available() else batch


def _joined(buffer: _Buffer, start: int, following: _Buffer) -> _Buffer:
    """What is left of a buffer from `start` on, and the next one."""
    left = buffer.order[start - buffer.start :]
    if len(left) == 0:
        return following
    return _Buffer(
        buffer.rows.take(left).followed_by(following.rows),
        np.concatenate([buffer.label_N[left], following.label_N]),
        np.concatenate([buffer.weight_N[left], following.weight_N]),
        np.concatenate([np.arange(len(left)), following.order + len(left)]),
        start,
    )


def _ahead(make: Callable[[], Generator[T, None, None]], depth: int) -> Generator[T, None, None]:
    """The generator's items, made in a thread up to `depth` ahead; its errors are raised here.

    The thread has ended when this generator has (at its end, closed, dropped), and before the interpreter goes.
    """
    made: queue.Queue[T | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: T | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                made.put(item, timeout=0.1)
                return not stop.is_set()
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            with closing(make()) as items:
                for item in items:
                    if not put(item):
                        return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=run, daemon=True, name=THREAD)
    _running[thread] = stop
    thread.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        _end(thread, stop, made)


def _end(thread: threading.Thread, stop: threading.Event, made: "queue.Queue[Any] | None" = None) -> None:
    stop.set()
    while made is not None and not made.empty():  # a thread that waits for room goes on at once
        made.get_nowait()
    if thread is not threading.current_thread():  # where the thread's own garbage collection has come here
        thread.join()
    _running.pop(thread, None)


@atexit.register
def _end_all() -> None:
    """Threads must not be inside of a library when the interpreter goes: unwinding them by force aborts the process."""
    for thread, stop in list(_running.items()):
        _end(thread, stop)
