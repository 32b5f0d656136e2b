"""`masknet ablate` from its options to its files."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from features.dataset import PreparedDataset
from features.errors import InputError
from features.files import file_written_whole, read_json
from training.ablation.cells import Cell, Grid
from training.ablation.document import update_document
from training.ablation.jobs import Job
from training.ablation.measure import measure
from training.ablation.report import render
from training.ablation.results import Answer, answer, write_answer
from training.ablation.study import Study, digest_of, open_study, remember, run_study, statistics
from training.ablation.tracked import TrackedStudy
from training.bench.machine import cpu_name
from training.config import NAME, load_config
from training.fit.starting import require_trainable
from training.numbers import number
from training.workers import DONE


@dataclass(frozen=True, kw_only=True)
class AblateOptions:
    """What `masknet ablate` was asked for; see its --help."""

    config: Path
    data: Path
    out: Path | None
    grid: Grid
    set: list[str] = field(default_factory=list)
    baseline: str = "layer"
    name: str | None = None
    seeds: int = 5
    tune_lr: int = 3
    jobs: int = 1
    rates: Path | None = None
    landscape: tuple[str, ...] = ()
    document: Path | None = None
    command: str = ""


def run_ablate(options: AblateOptions, console: Console) -> tuple[Answer, Path]:
    """Run or go on with a study; returns the answer and the folder it is in.

    Raises:
        InputError: the configuration, a cell or the data is wrong, or OUT holds a study of other data.
        Failure: the baseline has no finished run.
    """
    started = time.perf_counter()
    config = load_config(options.config, options.set)
    dataset = PreparedDataset.open(options.data)
    study = _study(options, options.grid.cells(config, options.baseline), config.experiment, dataset)
    valid, _ = dataset.split("valid"), dataset.files("test")
    for cell in study.cells:
        try:
            require_trainable(cell.config, dataset, valid)
        except InputError as error:
            raise InputError(f"cell {cell.name}: {error}") from None
    if options.document is not None and options.document.is_dir():
        raise InputError(f"--document {options.document} is a folder")
    tracked = TrackedStudy(study, config, open_study(study))
    remember(study, tracked.known)

    def finished(job: Job, result: dict[str, Any]) -> None:
        tracked.add(str(job.result.relative_to(study.out)), job, result)
        remember(study, tracked.known)
        if not console.is_terminal:
            console.print(f"{job.cell}, seed {result['seed']}: {_told(result)}", highlight=False, markup=False)

    status = "FAILED"
    try:
        with _progress(console) as move:
            outcomes = run_study(study, move, finished)
            able = [outcome.cell for outcome in outcomes if outcome.done]
            measured = measure(able, study.baseline, dataset, lambda turn, turns: move("timing", turn, turns))
            move("comparing", 0, 1)
            found = answer(study, outcomes, statistics(study, outcomes, dataset), measured, dataset, _device())
        found |= {"command": options.command, "seconds": time.perf_counter() - started}
        write_answer(found, study.out)
        with file_written_whole(study.out / "report.html") as aside:
            aside.write_text(render(found))
        if options.document is not None:
            update_document(options.document, found)
        status = "FINISHED"
    finally:
        tracked.close(study.out, status)
    return found, study.out


def _study(options: AblateOptions, cells: list[Cell], experiment: str, dataset: PreparedDataset) -> Study:
    name = options.name or experiment
    if not re.fullmatch(NAME, name):
        raise InputError(f"--name {name!r} may have letters, digits, spaces and . _ - only")
    known = [cell.name for cell in cells]
    strangers = [cell for cell in options.landscape if cell not in known]
    if strangers:
        raise InputError(f"--landscape {strangers[0]} is no cell; there are {', '.join(known)}")
    return Study(
        name=name,
        cells=cells,
        baseline=options.baseline,
        data=options.data,
        data_digest=digest_of(dataset),
        out=options.out or Path("runs") / "ablations" / name,
        seeds=options.seeds,
        trials=options.tune_lr,
        jobs=options.jobs,
        given_rates=None if options.rates is None else _rates(options.rates),
        landscape=options.landscape,
    )


def _rates(path: Path) -> dict[str, float]:
    """Learning rates by cell, from a study's rates.json."""
    if path.is_dir():
        raise InputError(f"--rates {path} is a folder; the file in it is rates.json")
    found = read_json(path, "--rates")
    good = isinstance(found, dict) and all(isinstance(rate, int | float) and 0 < rate < 1e6 for rate in found.values())
    if not good:
        raise InputError(f"--rates {path} must be a JSON object of positive learning rates by cell")
    return {cell: float(rate) for cell, rate in found.items()}


def _told(result: dict[str, Any]) -> str:
    if result["status"] != DONE:
        return f"{result['status']}: {result['reason']}"
    test = result["test"]
    return f"auc {number(test['auc'])}, logloss {number(test['logloss'])} in {result['seconds']:.0f} s"


def _device() -> dict[str, Any]:
    versions = {name: version(name) for name in ("torch", "torchrec", "numpy", "polars")}
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "versions": versions}


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    """A bar for each stage on a terminal; elsewhere nothing but a line when a stage begins."""
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def move(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
                if not console.is_terminal:
                    console.print(f"{stage}: {total}", highlight=False)
            bar.update(tasks[stage], completed=done)

        yield move
