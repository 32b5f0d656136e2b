"""`masknet score`."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from serving.bundle import load_bundle
from serving.models import locate
from serving.scoring.files import Scored, score_files
from training.errors import Stopped
from training.preparing import engine_of
from training.progress import stages


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What `masknet score` was asked for; see its --help."""

    model: str
    sources: list[str]
    out: Path
    columns: str | None
    engine: str
    address: str | None
    max_bad_rows: float
    resume: bool


def run_score(options: ScoreOptions, console: Console) -> tuple[dict[str, Any], Scored]:
    """`masknet score`: returns the result that --json prints, and what was done."""
    started = time.perf_counter()
    engine = engine_of(options.engine, options.address)
    located = locate(options.model)
    columns = None if options.columns is None else tuple(name for name in options.columns.split(",") if name)
    with stages(console) as progress, _stoppable(options.out):
        done = score_files(
            load_bundle(located.path),
            options.sources,
            options.out,
            version=located.version or "",
            columns=columns,
            engine=engine,
            max_bad_rows=options.max_bad_rows,
            resume=options.resume,
            progress=progress,
        )
    return {"out": str(options.out), "rows": done.rows, "seconds": time.perf_counter() - started}, done


@contextmanager
def _stoppable(out: Path) -> Iterator[None]:
    """For the length of a block SIGTERM is as Ctrl-C, and either ends it as something to go on with."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(f"stopped; go on with the same command and --out {out} --resume") from None
    finally:
        signal.signal(signal.SIGTERM, before)
