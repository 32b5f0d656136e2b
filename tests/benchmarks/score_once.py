"""One scoring of many rows in a process of its own; `score` starts it.

    python -m tests.benchmarks.score_once engine|files BUNDLE INPUT OUT

Prints one line of JSON: rows, seconds, and the peak of resident memory.

Timed: `files` the whole call of `score_files`, from raw files to scored parts on disk; `engine` the scorer alone, on
rows that are read and encoded before, a thread for each core scoring 8,192 at a time. That is the most it gives: one
call with all of PyTorch's threads waits at every operator for the slowest. Not timed for either: the start of Python,
imports, and the loading and checking of the bundle.
"""

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import torch

from serving.bundle import load_bundle
from serving.scoring.files import score_files
from tests.benchmarks.common import peak_rss_mib, rss_mib

ROWS = 8192  # that a thread of `engine` scores at a time


def main() -> None:
    """Load the bundle, then measure."""
    parser = argparse.ArgumentParser(description="Score rows once.")
    parser.add_argument("what", choices=["engine", "files"])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("input", type=Path, help="a raw file; for engine, Parquet")
    parser.add_argument("out", type=Path, help="folder of the scored parts; must not exist yet")
    options = parser.parse_args()
    bundle = load_bundle(options.bundle)
    if options.what == "engine":
        encoded = bundle.pipeline.encode(pq.read_table(options.input))
        parts = [encoded.slice(start, ROWS) for start in range(0, encoded.num_rows, ROWS)]
        torch.set_num_threads(1)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(bundle.scorer.score_encoded, parts[:2]))
            before, start = rss_mib(), time.perf_counter()
            rows = sum(len(score_N) for score_N in pool.map(bundle.scorer.score_encoded, parts))
    else:
        bundle.pipeline.warm_up()
        before, start = rss_mib(), time.perf_counter()
        rows = score_files(bundle, [str(options.input)], options.out).rows
    seconds = time.perf_counter() - start
    facts = {"rows_per_second": rows / seconds, "rss_before_mib": before, "peak_rss_mib": peak_rss_mib()}
    print(json.dumps({"rows": rows, "seconds": seconds, **facts}))


if __name__ == "__main__":
    main()
