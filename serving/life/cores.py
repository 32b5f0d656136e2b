"""How many cores this process may use, which in a container are fewer than the machine has."""

import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "max 100000", or microseconds of CPU time per so many microseconds


def usable_cores(quota: Path = _QUOTA) -> int:
    """Cores that the scheduler gives this process, and no more than its control group pays for; at least 1."""
    cores = len(os.sched_getaffinity(0))
    try:
        time, period = quota.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if time == "max" else max(1, min(cores, int(time) // int(period)))


def lower_priority(by: int = 10) -> None:
    """Let others go first from now on, in this thread alone and the threads it starts; there is no way back."""
    os.setpriority(os.PRIO_PROCESS, 0, min(19, os.getpriority(os.PRIO_PROCESS, 0) + by))
