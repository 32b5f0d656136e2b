"""Several processes on this machine, through torchrun."""

import os
import subprocess
import sys


def run_processes(count: int, arguments: list[str]) -> int:
    """Run `masknet ARGUMENTS` in `count` processes that train together; return torchrun's exit code."""
    threads = max(1, (os.cpu_count() or 1) // count)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += ["-m", "training", *arguments]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=False).returncode


def is_worker() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ
