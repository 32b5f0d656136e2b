"""The rows of the serving benchmark's result: latencies and stages, rates, memory."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.bench.serve_loader import Case, Loader
from training.bench.serve_search import LIMIT_MS, Search, p99
from training.bench.serve_stages import WAIT, scrape, split
from training.bench.timing import in_turns, quantiles
from training.errors import Failure

ENDPOINT, FAST = "masknet serve, exact, JSON", "masknet serve, fast, JSON"
RIVAL, ONNX = "FastAPI + PyTorch, JSON", "FastAPI + ONNX Runtime, JSON"  # ratios are to the first
LATENCY, RATE, STAGE, MEMORY, LOAD = "latency", "rate at p99 < 50 ms", "stage", "memory", "load's own time"
LONGEST = 10.0  # seconds of a run
_SOAK_PART = 500  # requests between two looks at the memory
_SETTLED = 0.05  # share of the requests after which memory should grow no more


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Args:
        turns: of each case, with `requests` in a row.
        steps: of the search for the rate, each with `runs` of `seconds`.
        least: requests of such a run, which takes longer where they come slowly, up to `LONGEST`.
    """

    turns: int
    requests: int
    steps: int
    runs: int
    seconds: float
    least: int

    def seconds_at(self, rate: float) -> float:
        """How long a run at this rate takes."""
        return min(max(self.seconds, self.least / rate), LONGEST)


def latencies(
    loader: Loader, cases: Sequence[Case], effort: Effort, differences: dict[str, float]
) -> list[dict[str, Any]]:
    """Rows of latency and of stages."""
    by_name = {case.name: case for case in cases}
    times: dict[str, list[float]] = {name: [] for name in by_name}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in by_name}
    own: list[float] = []
    last = {case.server.name: scrape(case.server.url) for case in cases if case.server.has_stages}
    for turn, name in enumerate(in_turns(list(by_name), effort.turns + 1)):
        case = by_name[name]
        found = loader.probe(case, "closed", warm=2, count=effort.requests)
        if found["failures"]:
            raise Failure(f"{name}: {found['failures']} of {effort.requests} requests failed")
        parts = {}
        if case.server.has_stages:
            time.sleep(WAIT)
            now = scrape(case.server.url)
            parts = split(last[case.server.name], now, float(np.mean(found["milliseconds"])))
            last[case.server.name] = now
        if turn < len(cases):
            continue  # the first turn warms up
        times[name] += found["milliseconds"]
        own.append(found["own_milliseconds"])
        stages[name] += [parts] if parts else []
    base = quantiles(times[RIVAL])["p50"] if times.get(RIVAL) else None
    rows = [_latency(name, found, base, differences.get(name)) for name, found in times.items()]
    rows += [row for name, found in stages.items() for row in _stage_rows(name, found)]
    return [*rows, {"name": LOAD, **quantiles(own), "unit": "ms/request", "runs": len(own)}]


def _latency(name: str, found: list[float], base: float | None, difference: float | None) -> dict[str, Any]:
    found_at = quantiles(found)
    row = {"name": LATENCY, "server": name, **found_at, "p99": _four(float(np.percentile(found, 99)))}
    ratio = None if base is None else _four(base / found_at["p50"])
    return {**row, "unit": "ms", "runs": len(found), "ratio": ratio, "largest_difference": difference}


def _stage_rows(name: str, found: list[dict[str, float]]) -> Iterator[dict[str, Any]]:
    for stage in dict.fromkeys(stage for parts in found for stage in parts):
        samples = [parts[stage] for parts in found if stage in parts]
        yield {"name": STAGE, "server": name, "stage": stage, **quantiles(samples), "unit": "ms", "runs": len(samples)}


def rates(
    loader: Loader, cases: Sequence[Case], effort: Effort, latencies: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of the largest rates; every run of every case has its turn."""
    p50 = {row["server"]: row["p50"] for row in latencies if row["name"] == LATENCY}
    searched = {case.name: case for case in cases if case.server.ranks}
    searches = {name: Search(high=1.5e3 / p50[name]) for name in searched}
    seed = 0
    for _ in range(effort.steps):
        for name in in_turns(list(searched), effort.runs):
            seed += 1
            rate = searches[name].rate
            found = loader.probe(searched[name], "open", rate=rate, seconds=effort.seconds_at(rate), seed=seed)
            searches[name].add(p99(found["milliseconds"], found["failures"], found["overrun"]))
        for search in searches.values():
            search.step()
    return [_rate(name, search, searches.get(RIVAL), effort) for name, search in searches.items()]


def _rate(name: str, search: Search, base: Search | None, effort: Effort) -> dict[str, Any]:
    """`too_many` is the least rate that was too high; with `at_least`, `ratio` is to the rival's."""
    row = {"name": RATE, "server": name, **quantiles([search.low]), "unit": "requests/s", "limit_ms": LIMIT_MS}
    row |= {"runs": effort.steps * effort.runs, "p99_ms": search.p99_ms and _four(search.p99_ms)}
    ratio = None if base is None else _four(search.low / (base.low or base.high))
    return {**row, "too_many": _four(search.high), "ratio": ratio, "at_least": base is not None and base.low == 0.0}


def memory(loader: Loader, case: Case, requests: int) -> list[dict[str, Any]]:
    """The endpoint's memory while so many requests are answered, and how much it grows after the first twentieth."""
    samples, sent = [], 0
    while sent < requests:
        part = min(_SOAK_PART, requests - sent)
        found = loader.probe(case, "closed", warm=0, count=part)
        if found["failures"]:
            raise Failure(f"{case.name}: {found['failures']} of {part} requests failed")
        sent += part
        samples.append(case.server.rss_mib())
    settled = samples[int(_SETTLED * len(samples)) :]
    row = {"name": MEMORY, "server": case.name, **quantiles(samples), "unit": "MiB", "runs": requests}
    return [{**row, "growth": _four(max(settled) / settled[0] - 1.0)}]


def _four(number: float) -> float:
    return float(f"{number:.4g}")
