"""Seconds and memory of all metrics of many scored rows, beside scikit-learn's, and of their bootstrap.

    python -m tests.benchmarks.evaluate [--rows N] [--groups N] [--runs N]

Each run has a process of its own, turns are taken; what is timed and how memory is measured is said in `evaluate_once`.
The goal is all metrics of 10 M rows with groups in 60 s on two cores.
"""

import argparse
from typing import Any

from tests.benchmarks.common import measured, run_module, write_result

GOAL = 60
TITLES = {
    "metrics": "all metrics, with groups",
    "sklearn": "AUC, PR-AUC, log loss and Brier by scikit-learn",
    "binned": "AUC and PR-AUC in bins",
    "bootstrap": "two scorers with intervals and differences",
}


def row(what: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the result."""
    memory = {key: round(max(run[key] for run in runs)) for key in ("rss_before_mib", "peak_rss_mib")}
    found = measured(TITLES[what], [run["seconds"] for run in runs], "s", **memory, found=runs[0]["found"])
    return found | ({"goal": GOAL, "met": found["p50"] <= GOAL} if what == "metrics" else {})


def main() -> None:
    """Measure and write results/evaluate.json."""
    parser = argparse.ArgumentParser(description="Seconds and memory of evaluating scored rows.")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--groups", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {what: [] for what in TITLES}
    for _ in range(options.runs):
        for what, done in runs.items():
            done.append(run_module("evaluate_once", what, options.rows, options.groups))
            print(f"{what}: {done[-1]['seconds']:.1f} s, {done[-1]['peak_rss_mib']:.0f} MiB", flush=True)
    rows = [row(what, done) for what, done in runs.items()]
    write_result("evaluate", {"scored_rows": options.rows, "groups": options.groups, "rows": rows})


if __name__ == "__main__":
    main()
