"""One unit of raw rows into one part of scored rows, in any process that sees the files.

A part appears when it is whole, and says in its footer what it was made of and what became of the unit's rows; a unit
that is done twice, because a process died, gives the same part again.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import astuple, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.checks import check_fields
from features.chunks import BadRow, RawChunk
from features.errors import InputError
from features.files import file_written_whole
from features.stages import Job, Quarantine, Scanned
from features.units import read_unit
from serving.bundle import Bundle, load_bundle

SCORE = "score"
_AHEAD = 2  # chunks of a unit that are being scored while another is read
_FOOTER = b"masknet.part"


@dataclass(frozen=True)
class Task:
    """A scoring as its processes know it. `columns` are those to keep (None: all), `model` names what scores."""

    job: Job
    parts: Path
    plan_digest: str
    columns: tuple[str, ...] | None
    model: dict[str, str]

    def part(self, unit: int) -> Path:
        """A unit's scored rows."""
        return self.parts / f"part-{unit:05d}.parquet"

    @property
    def needed(self) -> tuple[str, ...] | None:
        """The columns to read."""
        if self.columns is None:
            return None
        schema = self.job.schema
        return tuple(dict.fromkeys([*(f.name for f in schema.served_fields), *schema.date_columns, *self.columns]))


class _Scored(NamedTuple):
    table: pa.Table
    bad_rows: list[BadRow]
    end_line: int


def score_unit(task: Task, bundle: Bundle, pool: Executor | None, unit: int) -> Iterator[Scanned | None]:
    """Score a unit's rows into its part: None after every chunk, then what was found.

    Args:
        task: the scoring.
        bundle: its model.
        pool: scores chunks while others are read and written; without one each is scored where it was read.
        unit: the unit's number.

    Raises:
        InputError: the file cannot be read, lacks a column, or has one that can never hold what the schema says.
    """
    rows, lines, bad = 0, 0, Quarantine()
    with file_written_whole(task.part(unit)) as aside, bad.written(task.job.bad_file(unit)):
        writer: pq.ParquetWriter | None = None
        try:
            for scored in _in_order(pool, partial(_score_chunk, task, bundle), _chunks(task, unit)):
                bad.add(scored.bad_rows)
                rows, lines = rows + scored.table.num_rows, scored.end_line
                writer = writer or pq.ParquetWriter(aside, scored.table.schema, compression="zstd")
                if scored.table.num_rows:
                    writer.write_table(scored.table)
                yield None
            done = Scanned(unit, rows, lines, bad.reasons.total(), bad.reasons, bad.examples)
            assert writer is not None  # every unit has a chunk, if an empty one
            writer.add_key_value_metadata(_footer(task, done))
        finally:
            if writer is not None:
                writer.close()
    yield done


def score_unit_anywhere(task: Task, model: Path, unit: int) -> Iterator[Scanned | None]:
    """`score_unit` in a process that has to load the bundle `model` itself, which it does once."""
    return score_unit(task, _bundle(model, task.model["digest"]), None, unit)


@lru_cache(maxsize=1)
def _bundle(path: Path, digest: str) -> Bundle:
    bundle = load_bundle(path)
    assert bundle.digest == digest  # it has just been copied there
    return bundle


def done_already(task: Task, unit: int) -> Scanned | None:
    """What was found in a unit whose part is there; None if it is not, or is another plan's."""
    try:
        footer = pq.read_metadata(task.part(unit)).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    known = json.loads(footer.get(_FOOTER, b"{}"))
    if known.get("plan") != task.plan_digest or known["unit"] != unit or not task.job.bad_file(unit).exists():
        return None
    reasons = Counter({(column, rule): times for column, rule, times, _ in known["reasons"]})
    examples = {(column, rule): BadRow(*example) for column, rule, _, example in known["reasons"]}
    return Scanned(unit, known["rows"], known["lines"], reasons.total(), reasons, examples)


def rows_of_parts(parts: Path, plan_digest: str) -> tuple[int, int] | None:
    """Rows and bad rows of a finished scoring of the plan; None if the folder is of another."""
    found = [json.loads((pq.read_metadata(p).metadata or {}).get(_FOOTER, b"{}")) for p in parts.glob("*.parquet")]
    if not found or any(part.get("plan") != plan_digest for part in found):
        return None
    return sum(part["rows"] for part in found), sum(part["bad"] for part in found)


def _footer(task: Task, done: Scanned) -> dict[str, str]:
    reasons = [[*key, times, astuple(done.examples[key])] for key, times in done.reasons.items()]
    facts = {"plan": task.plan_digest, "unit": done.unit, "rows": done.rows, "lines": done.lines, "bad": done.bad}
    model = {f"masknet.{name}": value for name, value in task.model.items()}
    return {**model, _FOOTER.decode(): json.dumps({**facts, "reasons": reasons})}


def _chunks(task: Task, unit: int) -> Iterator[RawChunk]:
    """The unit's rows; of a Parquet file without rows an empty chunk, for its columns."""
    part = task.job.units[unit]
    source, chunk = task.job.sources[part.source], None
    for chunk in read_unit(source, part, task.job.schema.csv, task.needed):
        yield chunk
    if chunk is None:
        filesystem, path = source.filesystem()
        nothing = pq.read_schema(filesystem.open_input_file(path)).empty_table()
        for name, _ in source.partitions:
            nothing = nothing.append_column(name, pa.array([], pa.string()))
        yield RawChunk(source.path, nothing.select(task.needed or nothing.column_names), np.empty(0, np.int64), [], 0)


def _score_chunk(task: Task, bundle: Bundle, raw: RawChunk) -> _Scored:
    kept = raw.table if task.columns is None else raw.table.select(task.columns)
    if SCORE in kept.column_names:
        raise InputError(f"input {raw.path} already has a column {SCORE!r}: leave it out with --columns")
    columns, good_N, bad_rows = check_fields(raw, bundle.schema)
    order_by_G = bundle.scorer.uncalibrated(bundle.pipeline.encode_canonical(columns))
    scored_G = np.isfinite(order_by_G)
    lines = raw.line_N[good_N][~scored_G].tolist()
    bad_rows += [BadRow(raw.path, line, "", "", "its values are too large to be scored") for line in lines]
    good_N[good_N] = scored_G
    kept = kept if good_N.all() else kept.filter(pa.array(good_N))
    score_N = bundle.scorer.calibration.apply(order_by_G[scored_G])
    return _Scored(kept.append_column(SCORE, pa.array(score_N)), bad_rows, raw.end_line)


def _in_order(
    pool: Executor | None, work: Callable[[RawChunk], _Scored], chunks: Iterable[RawChunk]
) -> Iterator[_Scored]:
    """What `work` makes of the chunks, in their order, a few of them at a time."""
    if pool is None:
        yield from map(work, chunks)
        return
    waiting: deque[Future[Any]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(work, chunk))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
