"""One `prepare` of a Criteo-format file in a process of its own; `prepare` and `prepare_memory` start it.

    python -m tests.benchmarks.prepare_once RAW OUT [--pipeline FOLDER]

Prints one line of JSON: rows, seconds, the peak of resident memory, and the sizes of the vocabularies.

Timed: the call of `prepare`, from the raw file to the data set on disk with its statistics and hashes. Not timed: the
start of Python, the imports, the reading of the schema and, where one is given, of the fitted pipeline.
"""

import argparse
import json
import time
from pathlib import Path

from features.dataset import PreparedDataset
from features.encoders import Vocabulary
from features.pipeline import FeaturePipeline
from features.prepare import prepare
from features.schema import load_schema
from features.splits import SplitRule
from tests.benchmarks.common import SCHEMA, peak_rss_mib, rss_mib

SPLIT = "random:0.8,0.1,0.1"


def main() -> None:
    """Prepare RAW, with encoders fitted on four fifths of it, or with given ones as a single split."""
    parser = argparse.ArgumentParser(description="Prepare a Criteo-format file once.")
    parser.add_argument("raw", type=Path, help="headerless TSV: label, 13 counts, 26 hashes")
    parser.add_argument("out", type=Path, help="folder of the data set; must not exist yet")
    parser.add_argument("--pipeline", type=Path, help="folder of a fitted pipeline; nothing is fitted then")
    options = parser.parse_args()
    schema = load_schema(SCHEMA)
    pipeline = FeaturePipeline.load(options.pipeline) if options.pipeline else None
    split = None if pipeline else SplitRule.parse(SPLIT)
    before = rss_mib()
    start = time.perf_counter()
    done = prepare(
        schema, {"input" if split else "test": [str(options.raw)]}, options.out, split=split, pipeline=pipeline
    )
    seconds = time.perf_counter() - start
    peak = peak_rss_mib()
    fitted = pipeline or PreparedDataset.open(options.out).pipeline
    sizes = [len(field.encoder.values) for field in fitted.fields if isinstance(field.encoder, Vocabulary)]
    rows = sum(done.rows.values())
    print(
        json.dumps(
            {
                "rows": rows,
                "bad_rows": done.bad_rows,
                "seconds": seconds,
                "rows_per_second": rows / seconds,
                "rss_before_mib": before,
                "peak_rss_mib": peak,
                "vocabulary_values": sum(sizes),
                "largest_vocabulary": max(sizes),
            }
        )
    )


if __name__ == "__main__":
    main()
