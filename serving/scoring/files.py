"""Batch scoring: raw files in, Parquet with a score column out, a unit at a time, on an engine of `features.engines`.

What is done so far lies beside the output, in `.NAME.partial`: the plan, and the parts of the units that are done. The
output appears when it is whole, so a folder that is there has every row exactly once.
"""

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch

from features.engines import Engine, LocalEngine
from features.errors import InputError
from features.files import alone, remove_folder, require_absent
from features.prepare import Progress, first_lines, require_few_bad, write_quarantine
from features.stages import Job, Scanned
from serving.bundle import Bundle
from serving.scoring.part import SCORE, Task, done_already, rows_of_parts, score_unit, score_unit_anywhere
from serving.scoring.plan import Plan

__all__ = ["SCORE", "Scored", "score_files"]
DONE = "_SUCCESS"  # an empty file, as Spark and Hadoop leave one
QUARANTINE = "_quarantine"  # readers of folders pass over names that begin so


@dataclass(frozen=True)
class Scored:
    """How many rows have scores, and how many were set aside."""

    rows: int
    bad_rows: int


def score_files(
    bundle: Bundle,
    sources: list[str],
    out: Path,
    *,
    version: str = "",
    columns: tuple[str, ...] | None = None,
    engine: Engine | None = None,
    max_bad_rows: float = 0.0,
    resume: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Scored:
    """Score the rows of `sources` into the folder `out`: a Parquet part for each unit, rows in their order.

    Args:
        bundle: the model.
        sources: raw files, folders, globs or URIs.
        out: a folder that does not exist yet; it appears only when it is whole.
        version: what the registry calls the model; it and the model's name and digest stand in every part's metadata.
        columns: the raw columns to keep beside the score; by default all.
        engine: where the work is done; by default threads of this process, one for each core.
        max_bad_rows: the largest share of bad rows that is set aside, to `out`/_quarantine, rather than refused.
        resume: go on with what an interrupted call has left, if anything; else that is refused.
        progress: called with a stage's name, and how many of how many units are done.

    Raises:
        InputError: a file or the model has changed since the start, cannot be read, or has too many rows that cannot
            be scored; or a column is named twice. Parts that are done are kept for `resume`.
    """
    if columns is not None and (twice := [name for name in columns if columns.count(name) > 1]):
        raise InputError(f"--columns names {twice[0]!r} twice")
    plan = Plan.of(bundle, bundle.version(version), sources, columns)
    work = out.absolute().with_name(f".{out.name}.partial")
    if resume and (finished := _finished(out, work, plan)) is not None:
        return finished
    require_absent(out)
    if work.exists() and not resume:
        raise InputError(f"an unfinished scoring of {out} lies in {work}: go on with --resume, or remove it")
    with alone(work, "masknet score"):
        _require_unfinished(out, work)
        _begin(plan, work)
        job = Job(bundle.schema, plan.sources, plan.units, work / "bad")
        task = Task(job, work / "parts", plan.digest, columns, plan.facts["model"])
        try:
            found = _score(task, bundle, engine, max_bad_rows, progress)
            plan.require_unchanged()
        except InputError:
            if not any(task.parts.glob("*.parquet")):
                remove_folder(work)
            raise
        return _finish(task, found, out)


def _finished(out: Path, work: Path, plan: Plan) -> Scored | None:
    """What a finished call has made of the same plan, if it has."""
    if not (out / DONE).exists():
        return None
    told = rows_of_parts(out, plan.digest)
    if told is None:
        raise InputError(f"{out} is of another scoring: choose another --out")
    remove_folder(work)
    return Scored(*told)


def _require_unfinished(out: Path, work: Path) -> None:
    """InputError where another process has made the output while this one waited for its turn."""
    try:
        require_absent(out)
    except InputError:
        remove_folder(work)
        raise


def _begin(plan: Plan, work: Path) -> None:
    """A folder with the plan and nothing unfinished in it; InputError where it is another plan's."""
    if (work / "plan.json").exists():
        plan.require_same(work / "plan.json")
        for aside in [*work.glob(".*.partial-*"), *work.glob("*/.*.partial-*")]:  # of processes that were killed
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
    else:
        (work / "parts").mkdir(exist_ok=True)
        (work / "bad").mkdir(exist_ok=True)
        plan.write(work / "plan.json")


def _score(task: Task, bundle: Bundle, engine: Engine | None, max_bad_rows: float, progress: Progress) -> list[Scanned]:
    """Score the units that are not done yet; what was found in each of all, in their order."""
    total = len(task.job.units)
    found = {unit: done for unit in range(total) if (done := done_already(task, unit)) is not None}
    todo = [unit for unit in range(total) if unit not in found]
    bad = any(done.bad for done in found.values())
    progress("scoring", len(found), total)
    with (
        _function(task, bundle, engine) as (runs, function),
        closing(_results(runs, partial(_nth, function, todo), len(todo))) as results,
    ):
        for done in results:
            if done is not None:
                found[done.unit] = done
                progress("scoring", len(found), total)
                bad = bad or done.bad > 0
                if bad and not max_bad_rows:  # then the first bad row ends it, once all rows before it are known
                    _require_few_bad(task.job, found, max_bad_rows)
    _require_few_bad(task.job, found, max_bad_rows)
    return [found[unit] for unit in range(total)]


@contextmanager
def _function(
    task: Task, bundle: Bundle, engine: Engine | None
) -> Iterator[tuple[Engine, Callable[[int], Iterator[Scanned | None]]]]:
    """The engine, and what it runs on a unit; elsewhere than here that needs the model where all processes see it."""
    if engine is not None:
        model = task.parts.parent / "model"
        if not model.exists():
            aside = model.with_name(f".model.partial-{os.getpid()}")
            shutil.copytree(bundle.path, aside)
            aside.replace(model)
        yield engine, partial(score_unit_anywhere, task, model)
        return
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads below are made after this, and each scores chunks of its own
    try:
        with ThreadPoolExecutor(cores, "masknet-score") as pool:
            yield LocalEngine(min(cores, len(task.job.units))), partial(score_unit, task, bundle, pool)
    finally:
        torch.set_num_threads(threads)


def _nth(function: Callable[[int], Iterator[Scanned | None]], todo: list[int], number: int) -> Iterator[Scanned | None]:
    return function(todo[number])


def _results(
    engine: Engine, function: Callable[[int], Iterator[Scanned | None]], units: int
) -> Generator[Scanned | None, None, None]:
    if units:
        yield from engine.run(function, units)


def _require_few_bad(job: Job, found: dict[int, Scanned], max_bad_rows: float) -> None:
    """InputError with too many bad rows in the first units, up to one that is not done yet."""
    known = [found[unit] for unit in takewhile(found.__contains__, range(len(job.units)))]
    if any(part.bad for part in known):
        job = replace(job, units=job.units[: len(known)])
        require_few_bad(known, first_lines(job, known), max_bad_rows)


def _finish(task: Task, found: list[Scanned], out: Path) -> Scored:
    bad = sum(part.bad for part in found)
    shutil.rmtree(task.parts / QUARANTINE, ignore_errors=True)
    if bad:
        write_quarantine(task.job, first_lines(task.job, found), task.parts / QUARANTINE)
    (task.parts / DONE).touch()
    task.parts.replace(out)
    remove_folder(task.parts.parent)
    return Scored(sum(part.rows for part in found), bad)
