"""Rows per second of batch scoring, beside those of the scorer alone on rows in memory.

    python -m tests.benchmarks.score [--rows N] [--runs N] [--work DIR]

The model is that of `masknet bench serve`: 39 fields × 10, 3 parallel blocks × 400, r = 2, head 400, random weights.
The rows are its requests' with the context repeated, 32,000 different ones over and over. Every run has a process of
its own, and the kinds take turns; what is timed is said in `score_once`. The goal: with all cores, 90 % of the rate of
the scorer alone, from Parquet and from CSV, written to disk with every column.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from tests.benchmarks.common import measured, run_module, write_result
from training.bench.serve_model import FULL, joined, make_bundle, make_requests

GOAL = 0.9
ENGINE, PARQUET, CSV = "scorer alone, encoded rows in memory", "Parquet to Parquet", "CSV to Parquet"


def write_rows(work: Path, rows: int) -> dict[str, Path]:
    """The bundle's rows as a Parquet file in row groups of 65,536 and as a CSV file, by what reads them."""
    bundle = make_bundle(work / "bundle", FULL)
    block = pa.table(joined(make_requests(bundle.schema, FULL)))
    table = pa.concat_tables([block] * -(-rows // block.num_rows)).slice(0, rows)
    pq.write_table(table, work / "rows.parquet", row_group_size=65_536)
    csv.write_csv(table, work / "rows.csv")
    return {ENGINE: work / "rows.parquet", PARQUET: work / "rows.parquet", CSV: work / "rows.csv"}


def run(rows: int, runs: int, work: Path) -> dict[str, list[dict[str, Any]]]:
    """What each run reported, by what was run."""
    inputs = write_rows(work, rows)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in inputs}
    for number in range(runs):
        for name, path in inputs.items():
            what = "engine" if name == ENGINE else "files"
            found[name].append(run_module("score_once", what, work / "bundle", path, work / "out"))
            shutil.rmtree(work / "out", ignore_errors=True)
        told = (f"{name} {done[-1]['rows_per_second']:,.0f} rows/s" for name, done in found.items())
        print(f"run {number + 1} of {runs}: {', '.join(told)}", flush=True)
    return found


def main() -> None:
    """Measure and write results/score.json."""
    parser = argparse.ArgumentParser(description="Rows per second of batch scoring.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for temporary files; by default the system's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        found = run(options.rows, options.runs, Path(work))
    rows, engine = [], statistics.median(done["rows_per_second"] for done in found[ENGINE])
    for name, runs in found.items():
        speeds = [done["rows_per_second"] for done in runs]
        facts = {key: round(max(done[key] for done in runs)) for key in ("rss_before_mib", "peak_rss_mib")}
        row = measured(name, speeds, "rows/s", **facts)
        if name != ENGINE:
            ratio = round(statistics.median(speeds) / engine, 3)
            row |= {"share_of_scorer": ratio, "goal": GOAL, "met": ratio >= GOAL}
        rows.append(row)
    write_result("score", {"input": {"rows": options.rows}, "rows": rows})


if __name__ == "__main__":
    main()
