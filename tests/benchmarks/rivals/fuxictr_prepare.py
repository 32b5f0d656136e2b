"""Time FuxiCTR's data preparation on a Criteo-format file; run it with the python of FuxiCTR's own environment.

    python fuxictr_prepare.py RAW.tsv --rows N --work DIR

RAW.tsv has no header: label, I1..I13 (counts, may be empty), C1..C26 (hashes, may be empty), separated by tabs.

Timed: FuxiCTR's standard `build_dataset` and nothing else. It scans the three CSV files with polars, fits its
`FeatureProcessor` on the train part, encodes train, valid and test with Ray Data, and writes parquet together with the
vocabulary, the feature map and the pickled processor. `fit_seconds` is its `fit`; `transform_seconds` is the rest.
Polars is lazy, so either part includes its own reading of the CSV.

Not timed: the imports, the conversion of the first N rows to CSV with a header, the split of these rows into contiguous
80 / 10 / 10 % parts, and the start of Ray (3 to 4 s on two cores, which `build_dataset` would otherwise spend itself).

The features follow FuxiCTR's Criteo_x4 configuration: the counts go through the library's own `convert_to_bucket`
(floor(log(x)²) for x > 2) and are treated as categories, the hashes are categories, and values that occur fewer than
twice in the train part share the out-of-vocabulary id. Parquet goes out in blocks (`data_block_size`), the faster of
the two documented layouts: a single file per split makes Ray sort the rows back into order. The number of workers is
the library's own choice, half the cores.

`peak_rss_mib` adds the peak of this process to that of its largest finished child. Ray's workers are children of its
daemon and are missing from it, so it is a lower bound.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported

import fuxictr
import polars as pl
import ray
from fuxictr.datasets.criteo import CustomizedFeatureProcessor
from fuxictr.preprocess import build_dataset, init_ray

LABEL = "label"
COUNTS = [f"I{i}" for i in range(1, 14)]
HASHES = [f"C{i}" for i in range(1, 27)]
CATEGORY = {"active": True, "type": "categorical"}
FEATURES: list[dict[str, Any]] = [
    {"name": COUNTS, "dtype": "float", "fill_na": 0, "preprocess": "convert_to_bucket", **CATEGORY},
    {"name": HASHES, "dtype": "str", "fill_na": "", **CATEGORY},
]
MIN_COUNT = 2
BLOCK_ROWS = 100_000  # also the size of the batches in which FuxiCTR encodes


class TimedProcessor(CustomizedFeatureProcessor):
    """FuxiCTR's Criteo processor, which also notes how long its fit took."""

    fit_seconds = 0.0

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Fit as the library does."""
        start = time.perf_counter()
        super().fit(*args, **kwargs)
        self.fit_seconds = time.perf_counter() - start


def write_csv(raw: Path, rows: int, folder: Path) -> dict[str, str]:
    """Write the first `rows` rows as train, valid and test CSV with a header; return build_dataset's arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    tenth = rows // 10
    paths = {}
    with raw.open(encoding="ascii") as source:
        for part, size in (("train", rows - 2 * tenth), ("valid", tenth), ("test", tenth)):
            path = folder / f"{part}.csv"
            written = 0
            with path.open("w", encoding="ascii") as target:
                target.write(",".join([LABEL, *COUNTS, *HASHES]) + "\n")
                for line in islice(source, size):
                    target.write(line.replace("\t", ","))
                    written += 1
            if written < size:
                raise SystemExit(f"{raw} has fewer than {rows} rows")
            paths[f"{part}_data"] = str(path)
    return paths


def prepare(raw: Path, rows: int, work: Path) -> dict[str, Any]:
    """Run FuxiCTR's preparation once and return what it took."""
    paths = write_csv(raw, rows, work / "csv")
    output = work / "fuxictr"
    shutil.rmtree(output, ignore_errors=True)  # build_dataset does nothing where it finds an earlier feature map
    init_ray()
    label = {"name": LABEL, "dtype": "float"}
    processor = TimedProcessor(feature_cols=FEATURES, label_col=label, dataset_id="criteo", data_root=str(output))
    block = min(BLOCK_ROWS, rows // 10)  # a block larger than a split would ask Ray for zero blocks
    start = time.perf_counter()
    build_dataset(processor, **paths, min_categr_count=MIN_COUNT, data_block_size=block)
    seconds = time.perf_counter() - start
    ray.shutdown()
    peak_kib = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "name": "fuxictr",
        "version": fuxictr.__version__,
        "polars": pl.__version__,
        "rows": rows,
        "fit_seconds": round(processor.fit_seconds, 3),
        "transform_seconds": round(seconds - processor.fit_seconds, 3),
        "seconds": round(seconds, 3),
        "rows_per_second": round(rows / seconds, 1),
        "peak_rss_mib": round(peak_kib / 1024, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time FuxiCTR's data preparation on a Criteo-format file.")
    parser.add_argument("raw", type=Path, help="headerless TSV: label, 13 counts, 26 hashes")
    parser.add_argument("--rows", type=int, required=True, help="rows to take from its beginning, at least 10")
    parser.add_argument("--work", type=Path, required=True, help="folder for the CSV files and FuxiCTR's output")
    options = parser.parse_args()
    stdout = os.dup(1)
    os.dup2(2, 1)  # Ray reports to stdout; only the result belongs there
    outcome = prepare(options.raw, options.rows, options.work.resolve())
    sys.stdout.flush()
    os.dup2(stdout, 1)
    print(json.dumps(outcome))
