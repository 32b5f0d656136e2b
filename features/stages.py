"""The three passes of `prepare` over a unit of raw rows. Each can run in any process that sees the job's folder.

scan    raw rows → checked canonical columns, beside them the bad rows and the keys that decide on splits
count   canonical columns of training rows → counts that encoders are fitted on
encode  canonical columns → the parts of the prepared data set, and their statistics

Whatever a pass writes, it writes aside and renames: a unit that is done twice, because a process died, counts once.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from features.checks import check_chunk, quarantine_table
from features.chunks import BadRow
from features.dataset import FILE, GROUP, LABEL, LINE, SPLITS, TIME, WEIGHT
from features.files import file_written_whole
from features.fitting import ChunkCounts, count_columns
from features.pipeline import FeaturePipeline
from features.schema import Schema
from features.sources import Source
from features.splits import Assignment, KeyN, SplitN, random_keys, sampled, time_keys
from features.stats import Edges, Stats
from features.units import Unit, read_unit

ROW_GROUP = 65_536
_CHUNK_ROWS = 131_072  # of canonical rows: what the later passes hold at once
_IPC = ipc.IpcWriteOptions(compression="lz4")


@dataclass(frozen=True)
class Job:
    """What every pass has to know: where the rows come from, what they mean, and where work is put down."""

    schema: Schema
    sources: tuple[Source, ...]
    units: tuple[Unit, ...]
    work: Path
    optional: tuple[str, ...] = ()  # columns that may be absent
    split_seed: int | None = None  # of a random split; None where time decides, or the splits are given

    def rows_file(self, unit: int) -> Path:
        """Canonical rows of a unit."""
        return self.work / f"rows-{unit:05d}.arrow"

    def keys_file(self, unit: int) -> Path:
        """Keys by time, or lines, of a unit's rows."""
        return self.work / f"keys-{unit:05d}.npy"

    def bad_file(self, unit: int) -> Path:
        """Bad rows of a unit."""
        return self.work / f"bad-{unit:05d}.parquet"

    def keys(self, unit: int, first_line: int) -> KeyN:
        """The keys of a unit's rows, which decide on their splits."""
        stored_N = np.load(self.keys_file(unit), allow_pickle=False)
        if self.split_seed is None:
            return stored_N.view(np.uint64)
        return random_keys(self.split_seed, self.units[unit].source, stored_N + first_line)


@dataclass(frozen=True)
class Scanned:
    """What scanning a unit found. `reasons` counts bad rows by column and rule, each with its first example."""

    unit: int
    rows: int
    lines: int
    bad: int
    reasons: Counter[tuple[str, str]]
    examples: dict[tuple[str, str], BadRow]


def scan(job: Job, unit: int) -> Scanned:
    """Check a unit's rows and put the good ones down in canonical form."""
    part = job.units[unit]
    rows, lines = 0, 0
    bad = Quarantine()
    keys: list[npt.NDArray[np.int64]] = []
    with file_written_whole(job.rows_file(unit)) as aside, bad.written(job.bad_file(unit)):
        writer: ipc.RecordBatchStreamWriter | None = None
        source, schema = job.sources[part.source], job.schema
        for chunk in read_unit(source, part, schema.csv, schema.raw_columns, job.optional):
            table, bad_rows = check_chunk(chunk, schema)
            bad.add(bad_rows)
            lines = chunk.end_line
            rows += table.num_rows
            writer = writer or ipc.new_stream(aside, table.schema, options=_IPC)
            writer.write_table(table, max_chunksize=_CHUNK_ROWS)
            by_line = job.split_seed is not None or table[TIME].null_count > 0
            keys.append(table[LINE].to_numpy() if by_line else time_keys(table[TIME].to_numpy()).view(np.int64))
        if writer is None:
            aside.write_bytes(b"")
        else:
            writer.close()
    with file_written_whole(job.keys_file(unit)) as aside, aside.open("wb") as file:
        np.save(file, np.concatenate(keys) if keys else np.empty(0, np.int64), allow_pickle=False)
    return Scanned(unit, rows, lines, bad.reasons.total(), bad.reasons, bad.examples)


class Quarantine:
    """Writes a unit's bad rows as they come, and counts their reasons."""

    def __init__(self) -> None:
        self.reasons: Counter[tuple[str, str]] = Counter()
        self.examples: dict[tuple[str, str], BadRow] = {}

    @contextmanager
    def written(self, path: Path) -> Iterator[None]:
        """Within the block `add` writes to `path`, which appears at its end."""
        with file_written_whole(path) as aside:
            self._writer = pq.ParquetWriter(aside, quarantine_table([]).schema)
            try:
                yield
            finally:
                self._writer.close()

    def add(self, bad_rows: list[BadRow]) -> None:
        """Write and count bad rows."""
        if bad_rows:
            self._writer.write_table(quarantine_table(bad_rows))
        self.reasons.update((row.column, row.rule) for row in bad_rows)
        for row in bad_rows:
            self.examples.setdefault((row.column, row.rule), row)


@dataclass(frozen=True)
class Divided:
    """A job whose rows have found their splits. `first_line` is by unit the number of lines before it in its file."""

    job: Job
    assignment: Assignment
    first_line: tuple[int, ...]

    def chunks(self, unit: int) -> Iterator[tuple[pa.Table, SplitN]]:
        """A unit's canonical rows and their splits, without the negatives that sampling drops from training."""
        source = self.job.units[unit].source
        path = self.job.rows_file(unit)
        if path.stat().st_size == 0:
            return
        all_N = self.assignment.splits(self.job.keys(unit, self.first_line[unit]), unit, source)
        start = 0
        with pa.OSFile(str(path)) as file:
            for batch in ipc.open_stream(file):
                table, split_N = pa.Table.from_batches([batch]), all_N[start : start + batch.num_rows]
                start += batch.num_rows
                line_N = table[LINE].to_numpy() + self.first_line[unit]
                table = table.set_column(table.column_names.index(LINE), LINE, pa.array(line_N))
                sampling = self.job.schema.negative_sampling
                if sampling is not None:
                    kept_N = sampled(sampling.rate, source, line_N)
                    kept_N |= (table[LABEL].to_numpy() > 0) | (split_N != SPLITS.index("train"))
                    table, split_N = table.filter(pa.array(kept_N)), split_N[kept_N]
                yield table, split_N


def count(divided: Divided, unit: int) -> Iterator[tuple[int, ChunkCounts]]:
    """The unit's number with the counts of each chunk's training rows."""
    for table, split_N in divided.chunks(unit):
        train = table.filter(pa.array(split_N == SPLITS.index("train")))
        columns = {name: train[name].combine_chunks() for name in train.column_names}
        yield unit, count_columns(divided.job.schema.fields, columns)


def encode(divided: Divided, out: Path, digest: str, edges: Edges, unit: int) -> tuple[int, Stats]:
    """Encode a unit's rows into a part for each split that has any, with the pipeline in `out`; the unit's number and
    its statistics."""
    pipeline = pipeline_of(out / "pipeline", digest)
    stats = Stats(pipeline, edges)
    parts = [_Part(out / name / f"part-{unit:05d}.parquet") for name in SPLITS]
    source = divided.job.units[unit].source
    try:
        for table, split_N in divided.chunks(unit):
            columns = {f.name: table[f.name].combine_chunks() for f in pipeline.inputs}
            encoded = pipeline.encode_canonical(columns)
            stats.add(pipeline, table, encoded, split_N, edges)
            for name in (LABEL, WEIGHT, TIME, GROUP):
                encoded = encoded.append_column(name, table[name])
            encoded = encoded.append_column(FILE, pa.array(np.full(len(split_N), source, np.int32)))
            encoded = encoded.append_column(LINE, table[LINE])
            for number, part in enumerate(parts):
                part.write(encoded if (split_N == number).all() else encoded.filter(pa.array(split_N == number)))
    finally:
        for part in parts:
            part.close()
    for part in parts:
        part.finish()
    return unit, stats


@lru_cache(maxsize=1)
def pipeline_of(folder: Path, digest: str) -> FeaturePipeline:
    """The pipeline in a folder, loaded and its lookups built once in each process; known by its digest, since folders
    may be made anew."""
    pipeline = FeaturePipeline.load(folder)
    assert pipeline.digest == digest  # it has just been written
    pipeline.warm_up()
    return pipeline


class _Part:
    """A Parquet file that appears when it is whole, if any rows were written."""

    def __init__(self, path: Path) -> None:
        self._path, self._aside = path, path.with_name(f".{path.name}.partial-{os.getpid()}")
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        if table.num_rows == 0:
            return
        if self._writer is None:
            self._path.parent.mkdir(exist_ok=True)
            # plain values compress well enough, and decode several times faster than dictionaries
            self._writer = pq.ParquetWriter(
                self._aside, table.schema, compression="lz4", use_dictionary=[GROUP], write_statistics=False
            )
        self._writer.write_table(table, row_group_size=ROW_GROUP)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def finish(self) -> None:
        if self._writer is not None:
            self._aside.replace(self._path)
