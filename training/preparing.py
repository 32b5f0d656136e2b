"""`masknet prepare`. What needs torch or MLflow is imported only where a model is asked for."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from features.engines import Engine, LocalEngine
from features.errors import InputError
from features.files import require_absent
from features.pipeline import FeaturePipeline
from features.prepare import Prepared, prepare
from features.schema import load_schema
from features.splits import SplitRule
from features.synthetic import SCHEMAS, SYNTHETIC, write_criteo


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What `masknet prepare` was asked for; see its --help."""

    schema: str
    out: Path
    sources: dict[str, list[str]]
    split: str | None
    pipeline: str | None
    engine: str
    address: str | None
    max_bad_rows: float
    rows: int
    cardinality: int
    seed: int


def run_prepare(options: PrepareOptions, console: Console) -> tuple[dict[str, Any], Prepared]:
    """`masknet prepare`: returns the result that --json prints, and what was done."""
    started = time.perf_counter()
    if options.schema == SYNTHETIC:
        done = _prepare_synthetic(options, console)
    else:
        if options.schema.startswith("synthetic:"):
            raise InputError(f"{options.schema} is unknown; there is {SYNTHETIC}")
        done = _prepare(options, Path(options.schema), {}, console)
    seconds = time.perf_counter() - started
    return {"out": str(done.out), "rows": done.rows, "quarantined": done.bad_rows, "seconds": seconds}, done


def _prepare(options: PrepareOptions, schema: Path, facts: dict[str, Any], console: Console) -> Prepared:
    _require_sources(options)
    with _progress_bar(console) as move:
        return prepare(
            load_schema(schema),
            options.sources,
            options.out,
            split=SplitRule.parse(options.split) if options.split else None,
            pipeline=None if options.pipeline is None else _pipeline_of(options.pipeline),
            engine=engine_of(options.engine, options.address) or LocalEngine(),
            max_bad_rows=options.max_bad_rows,
            facts=facts,
            progress=move,
        )


def _pipeline_of(model: str) -> FeaturePipeline:
    from serving.bundle import load_bundle
    from serving.models import locate

    return load_bundle(locate(model).path).pipeline


def _prepare_synthetic(options: PrepareOptions, console: Console) -> Prepared:
    """Draw rows, prepare them, and leave the best possible metrics in the profile."""
    if options.sources or options.pipeline:
        raise InputError(f"{SYNTHETIC} makes its own rows: leave out --input, --train, --valid, --test and --pipeline")
    require_absent(options.out)
    options.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".synthetic-", dir=options.out.absolute().parent) as folder:
        raw = Path(folder) / "criteo.tsv"
        with console.status(f"drawing {options.rows:,} rows"):
            best = write_criteo(raw, options.rows, seed=options.seed, largest=options.cardinality)
        split = options.split or "random:0.8,0.1,0.1"
        made = replace(options, sources={"input": [str(raw)]}, split=split)
        return _prepare(made, SCHEMAS / "criteo.yaml", {"best_possible": asdict(best)}, console)


def _require_sources(options: PrepareOptions) -> None:
    """InputError unless either all rows are given with a rule to split them, or the splits one by one."""
    given = options.sources
    if ("input" in given) != bool(options.split) or ("input" in given and len(given) > 1) or not given:
        raise InputError("give either --input with --split, or --train, --valid and --test")
    missing = [f"--{name}" for name in ("train", "valid", "test") if name not in given]
    if "input" not in given and missing and options.pipeline is None:
        raise InputError(f"{', '.join(missing)} missing: every split needs rows")


def engine_of(name: str, address: str | None) -> Engine | None:
    """The engine that --engine and --address name; None for local."""
    if name == "ray":
        from features.ray_engine import RayEngine

        return RayEngine(address)
    if name != "local":
        raise InputError(f"--engine {name!r} is neither local nor ray")
    if address is not None:
        raise InputError("--address belongs to --engine ray")
    return None


@contextmanager
def _progress_bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each stage, on a terminal only; yields what moves it: stage, units done, units in all."""
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    tasks: dict[str, TaskID] = {}
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:

        def move(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        yield move
