"""What the measurements share: facts about the machine, quantiles, fresh processes and the files of results."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from training.bench.machine import cpu_name

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
SCHEMA = ROOT / "features" / "schemas" / "criteo.yaml"
_PACKAGES = ("polars", "polars-hash", "pyarrow", "numpy", "torch", "torchrec", "orjson")


def machine() -> dict[str, Any]:
    """The machine as far as timings depend on it."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(_kib("/proc/meminfo", "MemTotal") / 2**20, 1),
        "os": f"{platform.freedesktop_os_release()['PRETTY_NAME']}, Linux {platform.release()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """The versions of the libraries that do the work."""
    return {name: version(name) for name in _PACKAGES}


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, to four digits."""
    return {f"p{q}": float(f"{np.percentile(samples, q):.4g}") for q in (20, 50, 80)}


def measured(name: str, samples: Sequence[float], unit: str, **facts: Any) -> dict[str, Any]:
    """A row of a result."""
    return {"name": name, **quantiles(samples), "unit": unit, "runs": len(samples), **facts}


def write_result(name: str, result: dict[str, Any]) -> None:
    """Write `result`, which has its "rows", to results/<name>.json with the machine, the versions and the date."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    whole = {"device": machine(), "versions": versions(), "date": date, **result}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    for row in whole["rows"]:
        facts = ", ".join(f"{key} {value}" for key, value in row.items() if key != "name")
        print(f"{row['name']}: {facts}")
    print(f"written: {path}")


def rss_mib() -> float:
    """Memory that this process holds now."""
    return _kib("/proc/self/status", "VmRSS") / 1024


def peak_rss_mib() -> float:
    """The most memory that this process has held since it was started; unlike ru_maxrss, nothing of its parent's."""
    return _kib("/proc/self/status", "VmHWM") / 1024


def available_mib() -> float:
    """Memory that can still be taken."""
    return _kib("/proc/meminfo", "MemAvailable") / 1024


def run_json(command: Iterable[object]) -> dict[str, Any]:
    """Run a command in a process of its own and return the JSON on the last line of its output."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_module(name: str, *arguments: object) -> dict[str, Any]:
    """`run_json` for a module of this folder."""
    return run_json([sys.executable, "-m", f"tests.benchmarks.{name}", *arguments])


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _kib(path: str, key: str) -> int:
    return next(int(line.split()[1]) for line in _lines(path) if line.startswith(f"{key}:"))
