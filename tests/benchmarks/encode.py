"""Latency and memory of online encoding: 20 categorical fields × 500 candidates, with small and large vocabularies.

    python -m tests.benchmarks.encode [--fields-large N] [--size-small N] [--size-large N] [--requests N]

The small case has 100,000 values in each field's vocabulary, the large one 5,000,000 in the first --fields-large fields
and the small number in the others. Each case has a process of its own, so the memory of one is free before the next.
What is timed and what not, and how memory is measured, is said in `encode_once`.

The goals are for the median of requests by Zipf's law: 0.6 ms and 2 ms; and 150 bytes of memory per vocabulary entry.
"""

import argparse
from typing import Any

from tests.benchmarks.common import available_mib, measured, run_module, write_result

FIELDS, CANDIDATES = 20, 500
BYTES_GOAL = 150
_PEAK_BYTES = 170  # per entry, while the index is being sorted


def require_memory(entries: int) -> None:
    """Stop before the machine would run out of memory."""
    needed = entries * _PEAK_BYTES / 2**20
    print(f"{entries:,} entries need about {needed:,.0f} MiB while they are indexed")
    if needed > 0.9 * available_mib():
        raise SystemExit(f"{available_mib():,.0f} MiB are free: lower --fields-large or --size-large")


def case(name: str, sizes: list[int], requests: int, goal: float) -> list[dict[str, Any]]:
    """The rows of one case: latencies, and bytes per entry."""
    require_memory(sum(sizes))
    found = run_module("encode_once", *sizes, "--requests", requests, "--candidates", CANDIDATES)
    latency = measured(f"{name}, zipf", found["milliseconds"]["zipf"], "ms/request", goal=goal)
    uniform = measured(f"{name}, uniform", found["milliseconds"]["uniform"], "ms/request")
    counted = (found["index_bytes"] + found["values_bytes"]) / found["entries"]
    held = found["held_mib"] * 2**20 / found["entries"]
    facts = {key: found[key] for key in ("entries", "index_bytes", "values_bytes", "never_seen")}
    facts |= {"peak_rss_mib": round(found["peak_rss_mib"]), "goal": BYTES_GOAL}
    return [
        {**latency, "met": latency["p50"] <= goal},
        uniform,
        measured(f"{name}, memory counted", [counted], "bytes/entry", **facts, met=counted < BYTES_GOAL),
        measured(f"{name}, memory measured", [held], "bytes/entry", goal=BYTES_GOAL, met=held < BYTES_GOAL),
    ]


def main() -> None:
    """Measure and write results/encode.json."""
    parser = argparse.ArgumentParser(description="Latency and memory of online encoding.")
    parser.add_argument("--fields-large", type=int, default=FIELDS, help="fields with a large vocabulary, up to 20")
    parser.add_argument("--size-small", type=int, default=100_000)
    parser.add_argument("--size-large", type=int, default=5_000_000)
    parser.add_argument("--requests", type=int, default=300)
    options = parser.parse_args()
    small, large, many = options.size_small, options.size_large, options.fields_large
    rows = case(f"{FIELDS} × {small}", [small] * FIELDS, options.requests, 0.6)
    name = f"{many} × {large}" + (f" and {FIELDS - many} × {small}" if many < FIELDS else "")
    rows += case(name, [large] * many + [small] * (FIELDS - many), options.requests, 2.0)
    write_result("encode", {"fields": FIELDS, "candidates": CANDIDATES, "rows": rows})


if __name__ == "__main__":
    main()
