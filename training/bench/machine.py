"""The machine and the libraries, as far as timings depend on them."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "numpy", "liger-kernel", "quack-kernels")


def facts() -> dict[str, Any]:
    """The processor and, if there is one, the GPU."""
    found: dict[str, Any] = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if hasattr(os, "sched_getaffinity"):
        found["cores"] = len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {"gpu": gpu.name, "capability": [gpu.major, gpu.minor], "multiprocessors": gpu.multi_processor_count}
        found |= {"memory_gib": round(gpu.total_memory / 2**30, 1), "l2_mib": round(gpu.L2_cache_size / 2**20, 1)}
        found["driver"] = _driver()
    return found


def versions() -> dict[str, str | None]:
    """Of Python, of CUDA and of the libraries that do the work; None for what is not there."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu_name() -> str:
    """The processor's model, as Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout.strip().partition("\n")[0] or None
