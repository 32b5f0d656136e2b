"""Quality of training in bf16 beside fp32: a study of `masknet ablate` as a result.

    masknet demo    # prepares MovieLens-100k in runs/demo/data
    masknet ablate training/configs/movielens.yaml --data runs/demo/data --norms layer --seeds 5 --tune-lr 1 \\
        --vary train.precision=fp32,bf16 --name precision
    python -m tests.benchmarks.precision runs/ablations/precision/cells.json

Rows have the test AUC and log loss of each seed, and the study's test of the difference, which allows for the noise of
seeds and of test rows.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tests.benchmarks.common import measured, write_result

CELLS = {"layer": "fp32", "train.precision=bf16": "bf16"}
METRICS = ("auc", "logloss")


def rows_of(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per metric."""
    rows = []
    for metric in METRICS:
        found = cell["metrics"][metric]
        facts = {"by_seed": found["by_seed"], "sd_seeds": found["sd_seeds"]}
        difference = cell["differences"][metric]
        if difference is not None:
            facts["difference_from_fp32"] = difference
        rows.append(measured(f"{CELLS[cell['cell']]}, test {metric}", list(found["by_seed"].values()), metric, **facts))
    return rows


def main() -> None:
    """Write results/precision.json."""
    parser = argparse.ArgumentParser(description="The study of fp32 and bf16 as a result.")
    parser.add_argument("cells", type=Path, help="cells.json of the study")
    study = json.loads(parser.parse_args().cells.read_text())
    rows = [row for cell in study["cells"] if cell["cell"] in CELLS for row in rows_of(cell)]
    facts = {"data": study["data"]["rows"], "seeds": study["seeds"]}
    write_result("precision", {**facts, "rows": rows})


if __name__ == "__main__":
    main()
