"""Raw files into a prepared data set: scan, divide, count and fit, encode, whatever the size of the files."""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from features.chunks import BadRow
from features.dataset import FORMAT, SPLITS
from features.drift import LEVELS
from features.encoders import Scale
from features.engines import Engine, LocalEngine
from features.errors import InputError
from features.fields import FieldSpec
from features.files import folder_written_whole, hash_tree, require_absent, sha256_file, write_json
from features.fitting import Counts
from features.pipeline import FeaturePipeline
from features.profile import profile
from features.schema import Schema
from features.sources import Source, find_sources, refuse_twice
from features.splits import Assignment, SplitRule, cut_at, ranks_of
from features.stages import Divided, Job, Scanned, count, encode, pipeline_of, scan
from features.stats import Edges, Stats
from features.units import plan_units

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did, for its report."""

    out: Path
    rows: dict[str, int]
    bad_rows: int
    profile: dict[str, Any]


def prepare(
    schema: Schema,
    sources: dict[str, list[str]],
    out: Path,
    *,
    split: SplitRule | None = None,
    pipeline: FeaturePipeline | None = None,
    engine: Engine | None = None,
    max_bad_rows: float = 0.01,
    facts: dict[str, Any] | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Prepared:
    """Write the prepared data set `out` (see `features.dataset`).

    Args:
        schema: what the columns mean.
        sources: files by split, or all of them under "input" together with `split`.
        out: a folder that does not exist yet; it appears only when it is whole.
        split: how to divide "input".
        pipeline: fitted encoders to use as they are; by default they are fitted on the training split.
        engine: where the work is done; by default threads of this process.
        max_bad_rows: the largest share of bad rows that is set aside rather than refused.
        facts: more to write into profile.json, such as what is known of synthetic rows.
        progress: called with a stage's name, and how much of how many units is done.

    Raises:
        InputError: the files, the schema or the rows are wrong; nothing is left behind.
    """
    require_absent(out)
    if pipeline is not None:
        _require_same_fields(schema, pipeline)
    found, of_source = _find(sources, schema, split)
    with folder_written_whole(out) as folder:
        seed = split.seed if split and split.by == "random" else None
        # a model knows what to put for training-only fields, where its new rows do not have them
        optional = schema.training_only if pipeline is not None else ()
        job = Job(schema, tuple(found), tuple(plan_units(found)), folder / "work", optional, seed)
        job.work.mkdir()
        work = _Work(job, engine or LocalEngine(), progress)
        scanned = work.scan(max_bad_rows)
        divided = work.divide(scanned, of_source, split)
        pipeline, edges = work.fit(divided, pipeline)
        pipeline.save(folder / "pipeline")
        stats = work.encode(divided, pipeline, folder, edges)
        _require_rows(stats, set(SPLITS) if split else set(sources))
        write_quarantine(job, divided.first_line, folder / "quarantine")
        shutil.rmtree(job.work)
        described = {**profile(pipeline, stats, edges), **(facts or {})}
        write_json(folder / "profile.json", described)
        write_json(folder / "manifest.json", _manifest(schema, pipeline, found, folder))
    rows = {name: int(stats.rows_LS[:, number].sum()) for number, name in enumerate(SPLITS)}
    return Prepared(out, rows, sum(part.bad for part in scanned), described)


def _find(
    sources: dict[str, list[str]], schema: Schema, split: SplitRule | None
) -> tuple[list[Source], tuple[int, ...]]:
    if split and split.by == "time" and schema.time is None:
        raise InputError("--split time:… needs the schema's key time, the column to order the rows by")
    found: list[Source] = []
    of_source: list[int] = []
    for name, paths in sources.items():
        files = find_sources(paths)
        found += files
        of_source += [0 if split else SPLITS.index(name)] * len(files)
    refuse_twice(found)
    return found, tuple(of_source)


def _require_same_fields(schema: Schema, pipeline: FeaturePipeline) -> None:
    """InputError unless the schema says of every field what the pipeline was fitted for."""
    fitted: dict[str, FieldSpec] = {field.name: field.spec for field in pipeline.fields}
    for spec in schema.fields:
        if fitted.get(spec.name) != spec:
            raise InputError(f"schema: field {spec.name!r} is not what the model's pipeline was fitted for")
    missing = [name for name in fitted if name not in {spec.name for spec in schema.fields}]
    if missing or tuple(fitted) != tuple(spec.name for spec in schema.fields):
        raise InputError(f"schema: the model's pipeline has the fields {', '.join(fitted)}, in this order")


class _Work:
    """The passes over a job, on an engine."""

    def __init__(self, job: Job, engine: Engine, progress: Progress) -> None:
        self._job, self._engine, self._progress = job, engine, progress

    def scan(self, max_bad_rows: float) -> list[Scanned]:
        """Check all rows; the units' findings in their order."""
        total = len(self._job.units)
        self._progress("reading", 0, total)
        found: dict[int, Scanned] = {}
        for part in self._engine.run(partial(_once, scan, self._job), total):
            found[part.unit] = part
            self._progress("reading", len(found), total)
        scanned = [found[unit] for unit in range(total)]
        if not sum(part.rows + part.bad for part in scanned):
            raise InputError("the input has no rows")
        require_few_bad(scanned, first_lines(self._job, scanned), max_bad_rows)
        return scanned

    def divide(self, scanned: list[Scanned], of_source: tuple[int, ...], split: SplitRule | None) -> Divided:
        """Decide which split each row is in."""
        lines = first_lines(self._job, scanned)
        if split is None:
            return Divided(self._job, Assignment(of_source=of_source), lines)
        ranks = ranks_of(split.shares, sum(part.rows for part in scanned))
        cuts = cut_at(ranks, lambda unit: self._job.keys(unit, lines[unit]), len(scanned))
        return Divided(self._job, Assignment(cuts=cuts), lines)

    def fit(self, divided: Divided, pipeline: FeaturePipeline | None) -> tuple[FeaturePipeline, Edges]:
        """Fit the encoders on the training split, unless they are given; and the bins of value fields' profiles."""
        fields, total = self._job.schema.fields, len(self._job.units)
        counts = Counts()
        if pipeline is None:
            self._progress("fitting", 0, total)
            seen: set[int] = set()
            for unit, part in self._engine.run(partial(count, divided), total):
                counts.add(part)
                seen.add(unit)
                self._progress("fitting", len(seen), total)
            pipeline = FeaturePipeline.build(fields, counts.encoders(fields))
        return pipeline, _edges(pipeline, counts)

    def encode(self, divided: Divided, pipeline: FeaturePipeline, folder: Path, edges: Edges) -> Stats:
        """Write the parts; the statistics of all rows."""
        total = len(self._job.units)
        self._progress("encoding", 0, total)
        pipeline_of(folder / "pipeline", pipeline.digest)  # once, before threads that would each load it
        stats, waiting = Stats(pipeline, edges), dict[int, Stats]()
        merged = 0  # in the units' order, so that nothing depends on which ends first
        task = partial(_once, encode, divided, folder, pipeline.digest, edges)
        for unit, part in self._engine.run(task, total):
            waiting[unit] = part
            while merged in waiting:
                stats.merge(waiting.pop(merged))
                merged += 1
            self._progress("encoding", merged + len(waiting), total)
        pipeline_of.cache_clear()
        return stats


def _once(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    return [function(*arguments)]


def first_lines(job: Job, scanned: list[Scanned]) -> tuple[int, ...]:
    """For each unit, how many lines of its file are before it."""
    before: list[int] = []
    for number, (unit, _) in enumerate(zip(job.units, scanned, strict=True)):
        follows = number > 0 and job.units[number - 1].source == unit.source
        before.append(before[-1] + scanned[number - 1].lines if follows else 0)
    return tuple(before)


def require_few_bad(scanned: list[Scanned], lines: tuple[int, ...], max_bad_rows: float) -> None:
    """InputError with too many bad rows; names the three most frequent reasons. `lines` are `first_lines`."""
    bad, good = sum(part.bad for part in scanned), sum(part.rows for part in scanned)
    if bad <= max_bad_rows * (bad + good):
        return
    reasons: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], tuple[BadRow, int]] = {}
    for part in scanned:
        reasons.update(part.reasons)
        for key, example in part.examples.items():
            examples.setdefault(key, (example, example.line + lines[part.unit]))
    told = []
    for key, times in reasons.most_common(3):
        example, line = examples[key]
        where = f" column {example.column!r}:" if example.column else ""
        told.append(f"{times} rows like {example.file}:{line}{where} {example.reason}")
    raise InputError(f"{bad} of {bad + good} rows are bad, above --max-bad-rows {max_bad_rows}: {'; '.join(told)}")


def _require_rows(stats: Stats, wanted: set[str]) -> None:
    for number, name in enumerate(SPLITS):
        if name in wanted and not stats.rows_LS[:, number].sum():
            raise InputError(f"split {name!r} is empty: every split needs rows")


def _edges(pipeline: FeaturePipeline, counts: Counts) -> Edges:
    """Where the bins of value fields begin: the encoded vigintiles of the training rows."""
    edges: dict[str, npt.NDArray[np.float64]] = {}
    for field in pipeline.fields:
        if isinstance(field.encoder, Scale):
            encoded = field.encoder.encode(pa.array(counts.quantiles(field.name, LEVELS), pa.float64()))
            edges[field.name] = np.unique(encoded.to_numpy().astype(np.float64))
    return edges


def write_quarantine(job: Job, lines: tuple[int, ...], folder: Path) -> None:
    """The units' bad rows, with their lines in the files; one part for each unit that has any. `lines` are
    `first_lines`."""
    folder.mkdir()
    for unit, before in enumerate(lines):
        bad = pq.read_table(job.bad_file(unit))
        if bad.num_rows or unit == 0:  # an empty table says that there are none
            line_N = bad["line"].to_numpy() + before
            bad = bad.set_column(bad.column_names.index("line"), "line", pa.array(line_N, pa.int64()))
            pq.write_table(bad, folder / f"part-{unit:05d}.parquet")


def _manifest(schema: Schema, pipeline: FeaturePipeline, raw: list[Source], folder: Path) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "schema": schema.plain(),
        "pipeline_digest": pipeline.digest,
        "raw_files": [_raw_file(source) for source in raw],
        "files": hash_tree(folder),
    }


def _raw_file(source: Source) -> dict[str, Any]:
    known = {"path": source.path, "bytes": source.size}
    return known if "://" in source.path else {**known, "sha256": sha256_file(Path(source.path))}
