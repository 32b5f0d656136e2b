"""Processes under torchrun: how they meet, how they leave, and what the command that started them ends with."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import run as torchrun
from typer.testing import CliRunner

from features.errors import InputError
from training.cli import app
from training.launch import Launch

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "training" / "configs" / "movielens.yaml"
LAUNCH = """
import json, sys
from training import cli
from training.launch import Launch, run_processes
cli.app = lambda: sys.exit(run_processes(Launch(**json.loads(sys.argv[1])), "launch_worker", sys.argv[2:]))
cli.main()
"""


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"machines": "two"}, "--nnodes two: give N or MIN:MAX"),
        ({"machines": "0"}, "--nnodes 0: give N or MIN:MAX"),
        ({"machines": "3:2"}, "--nnodes 3:2: give N or MIN:MAX"),
        ({"machines": "1:2:3"}, "--nnodes 1:2:3: give N or MIN:MAX"),
        ({"machines": "2"}, "--nnodes 2 needs --rdzv-endpoint HOST:PORT"),
        ({"machines": "1:4"}, "--nnodes 1:4 needs --rdzv-endpoint HOST:PORT"),
        ({"machines": "2", "endpoint": "host"}, "--rdzv-endpoint host: give HOST:PORT"),
        ({"machines": "2", "endpoint": ":29400"}, "--rdzv-endpoint :29400: give HOST:PORT"),
        ({"machines": "2", "endpoint": "host:99999"}, "--rdzv-endpoint host:99999: give HOST:PORT"),
    ],
)
def test_a_mistake_is_told(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as error:
        Launch(**given)
    assert str(error.value).startswith(told)


def test_torchrun_understands_one_machine() -> None:
    found = torchrun.parse_args([*Launch(processes=4, restarts=3).torchrun(), "module"])
    assert (found.standalone, found.nnodes, found.nproc_per_node, found.max_restarts) == (True, "1", "4", 3)


def test_torchrun_understands_several_machines() -> None:
    launch = Launch(processes=8, machines="2:4", endpoint="host0:29400", job="nightly", restarts=1)
    found = torchrun.parse_args([*launch.torchrun(), "training", "train", "--nnodes", "7", "--nproc", "9"])
    assert (found.standalone, found.nnodes, found.nproc_per_node, found.max_restarts) == (False, "2:4", "8", 1)
    assert (found.rdzv_backend, found.rdzv_endpoint, found.rdzv_id) == ("c10d", "host0:29400", "nightly")
    assert (found.module, found.training_script) == (True, "training")
    assert found.training_script_args == ["train", "--nnodes", "7", "--nproc", "9"]


@pytest.mark.parametrize(
    ("given", "needed", "again", "shared"),
    [
        ({}, False, False, False),
        ({"processes": 2}, True, False, False),
        ({"restarts": 1}, True, True, True),
        ({"machines": "1", "endpoint": "host:1"}, True, False, False),
        ({"machines": "2", "endpoint": "host:1"}, True, False, True),
        ({"machines": "1:2", "endpoint": "host:1"}, True, True, True),
    ],
)
def test_what_a_launch_needs(given: dict[str, Any], needed: bool, again: bool, shared: bool) -> None:
    launch = Launch(**given)
    assert (launch.is_needed, launch.starts_again, launch.needs_shared_folder) == (needed, again, shared)


@pytest.mark.parametrize(
    "options", [["--nnodes", "2", "--rdzv-endpoint", "host:1"], ["--max-restarts", "1", "--nproc", "2"]]
)
def test_checkpoints_need_a_folder_that_is_found_again(options: list[str], tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["train", str(CONFIG), "--data", str(tmp_path), *options])
    assert isinstance(answer.exception, InputError)
    assert str(answer.exception).startswith("--nnodes and --max-restarts need --out: a folder that all machines see")


class Launched:
    """Commands that start processes of `launch_worker.py` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands = folder, list[subprocess.Popen[str]]()

    def start(self, case: str, **launch: Any) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        command = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, json.dumps({"processes": 2, **launch}), case],
            cwd=self.folder,
            env={**environment, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
            stderr=subprocess.PIPE,
            text=True,
            # a shell's background job, as these tests may be one, has its children ignore it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.commands.append(command)
        return command

    def start_machines(self, case: str, **launch: Any) -> list[subprocess.Popen[str]]:
        """Two commands that are two machines of two processes each; the first is where they meet."""
        port = free_port()
        where = {"machines": "2", "endpoint": f"127.0.0.1:{port}", **launch}
        first = self.start(case, **where)
        listening = re.compile(rf":{port:04X} 0+:0000 0A")
        wait_until(lambda: listening.search("".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))))
        return [first, self.start(case, **where)]

    def wait_for(self, pattern: str, count: int) -> None:
        wait_until(lambda: len(list(self.folder.glob(pattern))) == count)

    def facts(self) -> list[dict[str, int]]:
        """What the processes wrote of themselves at their end, by rank."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("rank-*.json"))]


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    launched = Launched(tmp_path)
    yield launched
    for command in launched.commands:
        command.kill()
        command.communicate()


def end(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Its exit code and what it and its processes have told."""
    told = process.communicate(timeout=120)[1]
    return process.returncode, told.splitlines()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_until(is_true: Callable[[], object]) -> None:
    for _ in range(600):
        if is_true():
            return
        time.sleep(0.1)
    pytest.fail("it is not so after a minute")


@pytest.mark.long
def test_processes_leave_together_and_leave_no_thread_of_a_process_group(launched: Launched) -> None:
    assert end(launched.start("leave")) == (0, [])
    cores = len(os.sched_getaffinity(0))
    assert launched.facts() == [{"gloo threads": 0, "threads": max(1, cores // 2)}] * 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "code", "told"),
    [
        ("fail_alone", 2, "masknet: rank 1's part is not readable"),
        ("fail_together", 2, "masknet: all of it is wrong"),
        ("be_killed", 1, "masknet: process 1 was killed by SIGKILL, as the system does when memory runs out"),
    ],
)
def test_a_fault_is_told_once_and_decides_the_exit_code(launched: Launched, case: str, code: int, told: str) -> None:
    assert end(launched.start(case)) == (code, [told])


@pytest.mark.long
def test_processes_start_again(launched: Launched) -> None:
    assert end(launched.start("be_killed_once", restarts=1)) == (0, [])
    assert len(launched.facts()) == 2


@pytest.mark.long
def test_machines_start_again_together(launched: Launched) -> None:
    ended = [end(command) for command in launched.start_machines("be_killed_once", restarts=1)]
    assert [code for code, _ in ended] == [0, 0], ended
    assert len(launched.facts()) == 4


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_processes_and_gives_75(launched: Launched, number: signal.Signals) -> None:
    command = launched.start("stop_when_asked")
    launched.wait_for("rank-*-runs", 2)
    command.send_signal(number)
    assert end(command) == (75, ["masknet: stopped; go on with --resume"])
    launched.wait_for("rank-*-stopped", 2)


@pytest.mark.long
def test_processes_stop_when_the_command_is_killed(launched: Launched) -> None:
    command = launched.start("stop_when_asked")
    launched.wait_for("rank-*-runs", 2)
    command.kill()
    launched.wait_for("rank-*-stopped", 2)


@pytest.mark.long
def test_a_signal_while_other_machines_are_waited_for_gives_75(launched: Launched) -> None:
    command = launched.start("leave", machines="2", endpoint=f"127.0.0.1:{free_port()}")
    time.sleep(6)
    command.terminate()
    assert end(command) == (75, [])


@pytest.mark.long
def test_a_signal_to_one_machine_stops_both(launched: Launched) -> None:
    first, second = launched.start_machines("stop_when_asked")
    launched.wait_for("rank-*-runs", 4)
    second.terminate()
    ended = [end(command) for command in (first, second)]
    assert [code for code, _ in ended] == [75, 75]
    assert [line for _, told in ended for line in told] == ["masknet: stopped; go on with --resume"]
    launched.wait_for("rank-*-stopped", 4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("lost", "told"),
    [
        (1, "masknet: another process of this training has ended or does not answer: Connection"),
        (0, "masknet: the machine at 127.0.0.1:"),
    ],
    ids=["any machine", "the machine where all meet"],
)
def test_a_machine_ends_with_the_other_one(launched: Launched, lost: int, told: str) -> None:
    commands = launched.start_machines("stop_when_asked")
    launched.wait_for("rank-*-runs", 4)
    power_off(commands[lost])
    code, lines = end(commands[1 - lost])
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith(told)


def power_off(command: subprocess.Popen[str]) -> None:
    """SIGKILL to it and its processes."""
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    for child in [command.pid, *map(int, children)]:
        os.kill(child, signal.SIGKILL)
