"""One evaluation of scored rows in a process of its own; `evaluate` starts it.

    python -m tests.benchmarks.evaluate_once {metrics,sklearn,binned,bootstrap} ROWS GROUPS

Prints one line of JSON: seconds, resident memory before and at the peak, and what was found. The memory before holds
labels and two models' scores in fp32, and groups as strings, one object each, as they come out of a data set.

Timed: `metrics` all of `score_metrics`, grouped ones too; `sklearn` AUC, average precision, log loss and Brier score by
scikit-learn, and nothing else; `binned` both areas as they are found above 20 M rows; `bootstrap` the metrics of two
scorers with intervals and their differences, 1,000 draws each. Not timed: the start of Python, the imports and the
drawing of the rows.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

from features.metrics import areas, score_metrics
from tests.benchmarks.common import peak_rss_mib, rss_mib
from training.evaluation.comparison import assess

FloatN = np.ndarray


def drawn(rows: int, groups: int) -> tuple[FloatN, FloatN, FloatN, np.ndarray]:
    """Labels with a rate of about a tenth, two models' scores, and groups with sizes by a power law."""
    random = np.random.default_rng(0)
    logit_N = random.standard_normal(rows, dtype=np.float32) - np.float32(2.6)
    score_N = 1 / (1 + np.exp(-logit_N))
    label_N = (random.random(rows, dtype=np.float32) < score_N).astype(np.float32)
    other_N = 1 / (1 + np.exp(-logit_N - np.float32(0.3) * random.standard_normal(rows, dtype=np.float32)))
    number_N = (groups * random.random(rows, dtype=np.float32) ** 2).astype(np.int32)
    return label_N, score_N, other_N, pc.cast(pa.array(number_N), pa.string()).to_numpy(zero_copy_only=False)


def sklearn_metrics(label_N: FloatN, score_N: FloatN) -> dict[str, float]:
    """What scikit-learn has of the metrics."""
    score = score_N.astype(np.float64)
    return {
        "auc": roc_auc_score(label_N, score_N),
        "pr_auc": average_precision_score(label_N, score_N),
        "logloss": log_loss(label_N, score),
        "brier": brier_score_loss(label_N, score),
    }


def main() -> None:
    """Draw the rows, then measure."""
    parser = argparse.ArgumentParser(description="Evaluate scored rows once.")
    parser.add_argument("what", choices=["metrics", "sklearn", "binned", "bootstrap"])
    parser.add_argument("rows", type=int)
    parser.add_argument("groups", type=int)
    options = parser.parse_args()
    label_N, score_N, other_N, group_N = drawn(options.rows, options.groups)
    work: dict[str, Callable[[], Any]] = {
        "metrics": lambda: score_metrics(label_N, score_N, group_N),
        "sklearn": lambda: sklearn_metrics(label_N, score_N),
        "binned": lambda: [vars(area) for area in areas(label_N, score_N, exact_rows=1)],
        "bootstrap": lambda: assess(label_N, {"a": score_N, "b": other_N}, group_N).comparisons["b"].sentence,
    }
    before = rss_mib()
    start = time.perf_counter()
    found = work[options.what]()
    seconds = time.perf_counter() - start
    facts = {"seconds": seconds, "rss_before_mib": before, "peak_rss_mib": peak_rss_mib()}
    print(json.dumps({**facts, "found": found}, ensure_ascii=False))


if __name__ == "__main__":
    main()
