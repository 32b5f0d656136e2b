"""One process of test_launch: joins the world as a training does, and behaves there as the case in its argument says.

How it ends is the command line's.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from features.errors import InputError
from training import cli
from training.distributed import World, join_world, sum_over_ranks
from training.errors import Stopped
from training.fit.stopping import stop_request

STEPS = 2000  # of 10 ms
KILLED = Path("rank-1-was-killed")


def leave(world: World) -> None:
    """Rank 0 has work left when the others are done; a cycle holds the process group, as models do."""
    cycle: list[object] = [dist.group.WORLD]
    cycle.append(cycle)
    exchange(world)
    if world.is_main:
        time.sleep(2)
        Path("rank-0-is-done").touch()


def exchange(world: World) -> float:
    return float(sum_over_ranks(torch.ones(1000))[0])


def fail_alone(world: World) -> None:
    """A fault that one rank finds while the others wait for it."""
    if world.rank == 1:
        raise InputError("rank 1's part is not readable")
    exchange(world)


def fail_together(world: World) -> None:
    exchange(world)
    raise InputError("all of it is wrong")


def be_killed(world: World) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    exchange(world)


def be_killed_once(world: World) -> None:
    if not KILLED.exists():
        if world.rank == 1:
            KILLED.touch()
        be_killed(world)
    exchange(world)


def be_late_the_second_time() -> None:
    """Then the others look this process up before it has said where it is."""
    if os.environ["RANK"] == "1" and KILLED.exists():
        time.sleep(3)


def stop_when_asked(world: World) -> None:
    """Go on until any rank is asked to stop; then there is more to write than torchrun waits for by itself."""
    with stop_request() as request:
        Path(f"rank-{world.rank}-runs").touch()
        for _ in range(STEPS):
            if sum_over_ranks(torch.tensor([float(request.was_asked())])).item() > 0:
                Path(f"rank-{world.rank}-stopped").touch()
                raise Stopped("stopped; go on with --resume")
            time.sleep(0.01)


CASES: dict[str, Callable[[World], object]] = {
    case.__name__: case for case in (leave, fail_alone, fail_together, be_killed, be_killed_once, stop_when_asked)
}


def gloo_threads() -> int:
    tasks = Path("/proc/self/task").iterdir()
    return sum("gloo" in (task / "comm").read_text() for task in tasks)


def run() -> None:
    be_late_the_second_time()
    try:
        with join_world() as world:
            CASES[sys.argv[1]](world)
            assert gloo_threads() > 0
        if not world.is_main:
            assert sys.argv[1] != "leave" or Path("rank-0-is-done").exists()
    finally:
        facts = {"gloo threads": gloo_threads(), "threads": torch.get_num_threads()}
        Path(f"rank-{os.environ['RANK']}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    vars(cli)["app"] = run
    cli.main()
