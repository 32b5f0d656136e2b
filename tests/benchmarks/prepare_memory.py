"""Peak of resident memory of `prepare` on a small and on a large file of about the same vocabularies.

    python -m tests.benchmarks.prepare_memory [--rows-small N] [--rows-large N] [--runs N] [--work DIR]

Memory should follow the vocabularies and not the rows, so the ids are drawn from few enough values that both files
hold most of them; the sizes that the vocabularies reached are in the result. Every run has a process of its own, and
the peak is VmHWM of that process: it includes Python and the libraries (`rss_before_mib` is what they held at the
start) and leaves out the page cache. Not measured: the drawing of the rows.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from features.synthetic import write_criteo
from tests.benchmarks.common import measured, run_module, write_result

LARGEST = 200_000


def run(rows: int, runs: int, work: Path) -> list[dict[str, Any]]:
    """What each run reported."""
    raw, out = work / f"raw-{rows}.tsv", work / "out"
    write_criteo(raw, rows, largest=LARGEST)
    found = []
    for _ in range(runs):
        found.append(run_module("prepare_once", raw, out))
        shutil.rmtree(out)
        print(f"{rows} rows: {found[-1]['peak_rss_mib']:.0f} MiB", flush=True)
    raw.unlink()
    return found


def main() -> None:
    """Measure and write results/prepare_memory.json."""
    parser = argparse.ArgumentParser(description="Peak memory of data preparation by the number of rows.")
    parser.add_argument("--rows-small", type=int, default=1_000_000)
    parser.add_argument("--rows-large", type=int, default=8_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for temporary files; by default the system's")
    options = parser.parse_args()
    sizes = (options.rows_small, options.rows_large)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        for size in sizes:
            found = run(size, options.runs, Path(work))
            facts = {key: round(found[0][key]) for key in ("rss_before_mib", "vocabulary_values", "largest_vocabulary")}
            peaks = [done["peak_rss_mib"] for done in found]
            rows.append(measured(f"{size} rows", peaks, "MiB at the peak", **facts))
    ratio = round(rows[1]["p50"] / rows[0]["p50"], 3)
    print(f"ratio of medians: {ratio}")
    write_result("prepare_memory", {"largest": LARGEST, "ratio_large_to_small": ratio, "rows": rows})


if __name__ == "__main__":
    main()
