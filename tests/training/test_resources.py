"""CPU and memory as they are sampled, beside what the operating system says of them."""

import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from training.tracking import resources
from training.tracking.resources import ResourceSampler


def test_a_sample_is_what_the_operating_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "SAMPLE_SECONDS", 0.2)
    samples: list[dict[str, float]] = []
    sampler = ResourceSampler(samples.append)
    ballast = np.ones(25_000_000)  # 200 MB
    busy_until = time.process_time() + 0.5
    while time.process_time() < busy_until:
        pass
    sampler.stop()
    count = len(samples)
    assert count >= 2
    kib = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    assert samples[-1]["system/process_memory_megabytes"] == pytest.approx(int(kib.split()[1]) * 1024 / 1e6, rel=0.1)
    assert samples[-1]["system/process_memory_megabytes"] > ballast.nbytes / 1e6
    assert max(sample["system/process_cpu_percentage"] for sample in samples) > 20
    used = psutil.virtual_memory()
    assert 0 < samples[-1]["system/system_memory_usage_megabytes"] < used.total / 1e6
    assert any(sample["system/cpu_utilization_percentage"] > 0 for sample in samples)
    time.sleep(0.5)
    assert len(samples) == count, "stopped"
