"""Rows per second of `prepare` on a Criteo-format file, and of FuxiCTR's preparation of the same rows.

    python -m tests.benchmarks.prepare [--rows N] [--runs N] [--rival PYTHON] [--work DIR]

Every run has a process of its own, and the programs take turns: ours, the rival, ours with fitted encoders, and again.

fit + transform   `prepare` with --split random:0.8,0.1,0.1. Timed is the whole call: reading and checking the TSV,
                  dividing, fitting, encoding, and writing Parquet, statistics and hashes (see `prepare_once`).
transform         `prepare` with encoders fitted before, all rows into the split test. Timed is the whole call again.
FuxiCTR           fit, transform and writing of its `build_dataset` (see `rivals/fuxictr_prepare.py`); not its start of
                  Ray, nor the conversion of the rows to CSV.

Not timed for any of them: the start of Python, imports, the drawing of the rows, and the deletion of the output. The
raw file has just been written or read, so it comes from the page cache.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from features.synthetic import write_criteo
from tests.benchmarks.common import measured, run_json, run_module, write_result

RIVAL = Path(__file__).parent / "rivals" / "fuxictr_prepare.py"
LARGEST = 1_000_000
FIT, TRANSFORM, FUXICTR = "fit + transform", "transform", "FuxiCTR fit + transform"


def run(rows: int, runs: int, rival: str | None, work: Path) -> dict[str, list[dict[str, Any]]]:
    """What each run reported, by what was run."""
    raw, out, fitted = work / "raw.tsv", work / "out", work / "fitted"
    write_criteo(raw, rows, largest=LARGEST)
    found: dict[str, list[dict[str, Any]]] = {FIT: [], TRANSFORM: [], FUXICTR: []}
    for number in range(runs):
        found[FIT].append(run_module("prepare_once", raw, out))
        if number == 0:
            shutil.copytree(out / "pipeline", fitted)
        shutil.rmtree(out)
        if rival:
            found[FUXICTR].append(run_json([rival, RIVAL, raw, "--rows", rows, "--work", out]))
            shutil.rmtree(out)
        found[TRANSFORM].append(run_module("prepare_once", raw, out, "--pipeline", fitted))
        shutil.rmtree(out)
        told = (f"{name} {done[-1]['seconds']:.1f} s" for name, done in found.items() if done)
        print(f"run {number + 1} of {runs}: {', '.join(told)}", flush=True)
    return found


def main() -> None:
    """Measure and write results/prepare.json."""
    parser = argparse.ArgumentParser(description="Rows per second of data preparation.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rival", help="python of an environment with FuxiCTR; without it only ours is measured")
    parser.add_argument("--work", type=Path, help="folder for temporary files; by default the system's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        found = run(options.rows, options.runs, options.rival, Path(work))
    rows = []
    for name, runs in found.items():
        if runs:
            speeds = [done["rows_per_second"] for done in runs]
            peak = round(statistics.median(done["peak_rss_mib"] for done in runs))
            rows.append(measured(name, speeds, "rows/s", peak_rss_mib=peak))
    ours = found[FIT][0]
    result = {
        "input": {"rows": options.rows, "largest": LARGEST, "bad_rows": ours["bad_rows"]},
        "vocabulary_values": ours["vocabulary_values"],
        "rows": rows,
    }
    if found[FUXICTR]:
        speed = {name: statistics.median(done["rows_per_second"] for done in found[name]) for name in (FIT, FUXICTR)}
        result["ratio_to_fuxictr"] = round(speed[FIT] / speed[FUXICTR], 2)
        result["rival"] = {key: found[FUXICTR][0][key] for key in ("name", "version", "polars")}
        print(f"ratio of medians: {result['ratio_to_fuxictr']}")
    write_result("prepare", result)


if __name__ == "__main__":
    main()
