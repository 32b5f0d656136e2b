"""Several processes on this machine, through torchrun."""

import logging
import os
import time

_PATIENCE = 5.0  # seconds


def run_processes(count: int, arguments: list[str]) -> int:
    """Run `masknet ARGUMENTS` in `count` processes that train together; return 0 or the first failure's exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    threads = max(1, (os.cpu_count() or 1) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # torchrun's own account of a failure repeats what the process itself has said.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    command = ["--standalone", f"--nproc-per-node={count}", "-m", "training", *arguments]
    try:
        run.run(run.parse_args(command))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def is_worker() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def let_rank_0_speak() -> None:
    """Wait, on other ranks, for rank 0 to tell of a fault that all ranks found: then torchrun ends this process.

    A fault that is this rank's alone is told after the wait.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_PATIENCE)
