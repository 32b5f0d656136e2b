"""serving/BENCHMARK.md from a result of `masknet bench serve`.

python -m training.bench.serve_page RESULT.json [PAGE]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.bench.serve_overload import CLIENTS, OVERLOAD, TIMES
from training.bench.serve_rows import ENDPOINT, FAST, LATENCY, LOAD, MEMORY, ONNX, RATE, RIVAL, STAGE
from training.bench.serve_stages import BUT_MODEL, OUTSIDE

PAGE = Path(__file__).parents[2] / "serving" / "BENCHMARK.md"
# What is aimed at: latency and rate against a rival, milliseconds beside the model, p99 under overload over that of a
# server without load, growth of memory.
GOALS = {(ENDPOINT, RIVAL): 3.0, (FAST, RIVAL): 6.0, (ENDPOINT, ONNX): 1.3, (FAST, ONNX): 2.0}
BUT_MODEL_MS = {"JSON": 1.8, "Arrow": 1.2}
OVERLOADED, GROWTH = 3.0, 0.05
_ORDER = ("queue", "parse", "fetch", "encode", "lookup", "model", "respond", OUTSIDE, BUT_MODEL)
_HEAD = """
# How fast the endpoint answers

Written by `python -m training.bench.serve_page` from [a result](../tests/benchmarks/results/serve.json) of
`masknet bench serve`. {device}, {date}; {cores} of its cores for each server and its threads, one for the load.

{fields} fields × 10 ({context} of them context), 3 parallel blocks × {width}, r = 2, head {head}, random weights:
26 categorical fields as Criteo's, two of them hashed, and 13 numbers. A request is one user and {candidates}
candidates; connections are kept alive. All servers run at the same time and are asked in turns, each with one working
process; every one's scores are the reference scorer's, or as near as its mode promises, before it is measured.

- **FastAPI + PyTorch**: pydantic models, this project's encoders on whole rows, the trained network as it is.
- **FastAPI + ONNX Runtime**: the same with the network exported in fp32.
- **mlflow models serve**: the registered model; rows with the context in each.
- **HTTP alone**: uvicorn with ten constant scores.
"""


def page(result: dict[str, Any]) -> str:
    """The whole page."""
    rows, shape, device = result["rows"], result["shape"], result["device"]
    facts = {key: shape[key] for key in ("fields", "context", "width", "head", "candidates")}
    head = _HEAD.format(device=device["cpu"], date=result["date"][:10], cores=device["server_cores"], **facts)
    parts = [_latency(rows), _rate(rows), _overload(rows), _stages(rows), _memory(rows), _goals(rows)]
    return "\n\n".join(part.strip() for part in [head, *parts, _skipped(result)] if part.strip()) + "\n"


def _of(rows: Sequence[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """Rows of one name by their server."""
    return {row["server"]: row for row in rows if row["name"] == name}


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, rule, *lines])


def _latency(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for server, row in _of(rows, LATENCY).items():
        times = [f"{row[key]:.3g}" for key in ("p20", "p50", "p80", "p99")]
        away = row["largest_difference"]
        lines.append([server, *times, _times(row["ratio"]), "" if away is None else f"{away:.1g}"])
    heads = ["ms, one client", "p20", "p50", "p80", "p99", "PyTorch's p50 over it", "largest error"]
    own = next(row for row in rows if row["name"] == LOAD)
    note = f"Of every figure about {own['p50']:.2g} ms are the client's own."
    return f"## Latency\n\n{_table(heads, lines)}\n\n{note}"


def _rate(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for server, row in _of(rows, RATE).items():
        p99 = "–" if row["p99_ms"] is None else f"{row['p99_ms']:.3g}"
        lines.append(
            [server, f"{row['p50']:.3g}", p99, f"{row['too_many']:.3g}", _times(row["ratio"], row["at_least"])]
        )
    heads = ["requests/s that arrive at random", "with p99 < 50 ms", "p99, ms", "too many", "over PyTorch's"]
    return f"## Rate\n\n{_table(heads, lines)}"


def _times(ratio: float | None, at_least: bool = False) -> str:
    return "" if ratio is None else f"{'≥ ' if at_least else ''}{ratio:.2f} ×"


def _overload(rows: Sequence[dict[str, Any]]) -> str:
    """Nothing of a result from before this was measured."""
    found = _of(rows, OVERLOAD)
    if not found:
        return ""
    lines = []
    for server, row in found.items():
        p99 = f"{'≥ ' if row['overrun'] else ''}{row['p99']:.3g}"
        rates = [f"{row[key]:.3g}" for key in ("sustained", "rate")]
        times = [f"{row['unloaded_p99']:.3g}", f"{row['p50']:.3g}", p99]
        lines.append([server, *rates, *times, f"{row['shed']:.1%}", _times(row["ratio"], row["overrun"])])
    heads = ["ms, of what is answered with 200", "computes/s", "arrive/s", "p99 unloaded", "p50", "p99", "shed", "p99s"]
    seconds, requests = (min(row[key] for row in found.values()) for key in ("seconds", "unloaded_runs"))
    note = (
        f"Requests arrive at random for {seconds:.0f} s, {TIMES:g} times as many as the server answers a second while "
        f"{CLIENTS} clients always ask; counted from when they were due. Unloaded: {requests} or more, one at a time, "
        "with a pause before each. A server that refuses nothing is given up (≥) once 200 wait. The load computes "
        f"{max(row['core'] for row in found.values()):.0%} of its core's time at most, and 99 % of the requests are "
        f"sent within {max(row['late_p99'] for row in found.values()):.2g} ms."
    )
    return f"## Overload\n\n{_table(heads, lines)}\n\n{note}"


def _stages(rows: Sequence[dict[str, Any]]) -> str:
    found = [row for row in rows if row["name"] == STAGE]
    if not found:
        return ""
    servers = list(dict.fromkeys(row["server"] for row in found))
    p50 = {(row["server"], row["stage"]): f"{row['p50']:.3f}" for row in found}
    stages = [stage for stage in _ORDER if any((server, stage) in p50 for server in servers)]
    lines = [[stage, *(p50.get((server, stage), "") for server in servers)] for stage in stages]
    return f"## Where the time goes\n\n{_table(['ms, medians of turns', *servers], lines)}"


def _memory(rows: Sequence[dict[str, Any]]) -> str:
    found = _of(rows, MEMORY)
    text = [
        f"{server}: {row['p50']:,.0f} MiB over {row['runs']:,} requests, at most {row['growth']:.1%} more than after "
        "the first twentieth."
        for server, row in found.items()
    ]
    return "## Memory\n\n" + "\n".join(text) if text else ""


def _goals(rows: Sequence[dict[str, Any]]) -> str:
    lines = [*_ratios(rows), *_beside_the_model(rows)]
    for server, row in _of(rows, OVERLOAD).items():
        if server in (ENDPOINT, FAST):
            met, ratio = row["ratio"] <= OVERLOADED and not row["overrun"], _times(row["ratio"], row["overrun"])
            what = f"p99 at {TIMES:g} × the load, {server}, over the unloaded"
            lines.append(_goal(what, ratio, _times(OVERLOADED), met))
    for server, row in _of(rows, MEMORY).items():
        lines.append(
            _goal(f"growth of memory, {server}", f"{row['growth']:.1%}", f"{GROWTH:.0%}", row["growth"] <= GROWTH)
        )
    return f"## Goals\n\n{_table(['', 'measured', 'goal', 'met'], lines)}" if lines else ""


def _ratios(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    latency, rate, lines = _of(rows, LATENCY), _of(rows, RATE), []
    for (server, rival), goal in GOALS.items():
        if server in latency and rival in latency:
            found = latency[rival]["p50"] / latency[server]["p50"]
            lines.append(_goal(f"p50, {server}, against {rival}", _times(found), _times(goal), found >= goal))
        if server in rate and rival in rate:
            base = rate[rival]["p50"] or rate[rival]["too_many"]
            found = rate[server]["p50"] / base
            measured = _times(found, not rate[rival]["p50"])
            lines.append(_goal(f"rate, {server}, against {rival}", measured, _times(goal), found >= goal))
    return lines


def _beside_the_model(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    lines = []
    for row in rows:
        if row["name"] == STAGE and row["stage"] == BUT_MODEL:
            limit = BUT_MODEL_MS[row["server"].rpartition(", ")[2]]
            found = row["p50"]
            lines.append(_goal(f"{BUT_MODEL}, {row['server']}", f"{found:.2f} ms", f"{limit} ms", found <= limit))
    return lines


def _goal(what: str, measured: str, goal: str, met: bool) -> list[str]:
    return [what, measured, goal, "yes" if met else "no"]


def _skipped(result: dict[str, Any]) -> str:
    lines = [f"- {one['name']}: {one['reason']}" for one in result["skipped"]]
    return "\n".join(["## Left out", "", *lines]) if lines else ""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="serving/BENCHMARK.md from a result of masknet bench serve.")
    parser.add_argument("result", type=Path)
    parser.add_argument("page", type=Path, nargs="?", default=PAGE)
    given = parser.parse_args()
    given.page.write_text(page(json.loads(given.result.read_text())))


if __name__ == "__main__":
    main()
