"""What becomes of requests where twice as many arrive as a server can compute.

How many it can compute is how many it answers while several clients ask again at once: it never idles then, and nobody
waits for more than one other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from training.bench.serve_loader import Case, Loader
from training.bench.serve_rows import ENDPOINT, FAST, ONNX, RIVAL
from training.bench.timing import in_turns, quantiles
from training.errors import Failure

OVERLOAD = "overload"
TIMES, CLIENTS = 2.0, 2
ASKED = (ENDPOINT, FAST, RIVAL, ONNX)


@dataclass(frozen=True)
class Pressure:
    """How much is measured.

    Args:
        turns: of each server.
        requests: to a server that does nothing else, `pause` seconds apart.
        busy: seconds in which clients find out what it can compute.
        seconds: of overload.
    """

    turns: int
    requests: int
    pause: float
    busy: float
    seconds: float


@dataclass
class _Found:
    """Of one server, over its turns; milliseconds."""

    unloaded: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    sustained: list[float] = field(default_factory=list)
    core: list[float] = field(default_factory=list)
    failures: int = 0
    shed: int = 0
    overrun: bool = False


def overloads(loader: Loader, cases: Sequence[Case], pressure: Pressure) -> list[dict[str, Any]]:
    """Rows of the endpoint and of rivals, those that run.

    Raises:
        Failure: a request without load fails, or one under load that a server has neither refused nor given up.
    """
    asked = {case.name: case for case in cases if case.name in ASKED}
    found = {name: _Found() for name in asked}
    for seed, name in enumerate(in_turns(list(asked), pressure.turns)):
        _turn(loader, asked[name], pressure, seed, found[name])
    return [_row(name, each, pressure) for name, each in found.items()]


def _turn(loader: Loader, case: Case, pressure: Pressure, seed: int, found: _Found) -> None:
    alone = loader.probe(case, "closed", warm=2, count=pressure.requests, pause=pressure.pause)
    most = loader.probe(case, "busy", clients=CLIENTS, seconds=pressure.busy)
    if failures := alone["failures"] + most["failures"]:
        raise Failure(f"{case.name}: {failures} requests failed without overload")
    over = loader.probe(case, "open", rate=TIMES * most["rate"], seconds=pressure.seconds, seed=seed)
    if over["failures"] > over["shed"] and not over["overrun"]:
        raise Failure(f"{case.name}: {over['failures'] - over['shed']} requests failed under overload")
    found.unloaded += alone["milliseconds"]
    found.accepted += over["milliseconds"]
    found.late += over["late"]
    found.sustained.append(most["rate"])
    found.core.append(over["core"])
    found.failures += over["failures"]
    found.shed += over["shed"]
    found.overrun |= over["overrun"]


def _row(name: str, found: _Found, pressure: Pressure) -> dict[str, Any]:
    """Quantiles are those of accepted requests; `ratio` is of their p99 to that of a server without load."""
    sustained, p99, unloaded = float(np.mean(found.sustained)), _p99(found.accepted), _p99(found.unloaded)
    return {
        "name": OVERLOAD,
        "server": name,
        **quantiles(found.accepted),
        "p99": _four(p99),
        "unit": "ms",
        "runs": len(found.accepted),
        "unloaded_p50": quantiles(found.unloaded)["p50"],
        "unloaded_p99": _four(unloaded),
        "unloaded_runs": len(found.unloaded),
        "sustained": _four(sustained),
        "rate": _four(TIMES * sustained),
        "seconds": pressure.turns * pressure.seconds,
        "shed": _four(found.shed / (len(found.accepted) + found.failures)),
        "overrun": found.overrun,
        "ratio": _four(p99 / unloaded),
        "late_p99": _four(_p99(found.late)),
        "core": _four(max(found.core)),
    }


def _p99(milliseconds: Sequence[float]) -> float:
    return float(np.percentile(milliseconds, 99))


def _four(number: float) -> float:
    return float(f"{number:.4g}")
