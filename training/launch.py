"""Several processes, on this machine or on several, through torchrun."""

import ctypes
import logging
import os
import signal
import time
from dataclasses import dataclass
from types import FrameType

from features.errors import InputError
from training.errors import Failure

STOPPED = 75  # sysexits.h's EX_TEMPFAIL: not done, and worth another try
_PATIENCE = 5.0  # seconds
# A stopped process gets as long as this to write its checkpoint. A scheduler's own grace period ends before it.
_CHECKPOINT_SECONDS = 600
# The store in which torchrun's processes look each other up outlives them, unless this is 1: started again, they would
# find addresses of processes that are gone (pytorch/pytorch#135712).
_STORE_APART = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How many processes train together, and where.

    Attributes:
        processes: on each machine.
        machines: "N"; or "MIN:MAX", where training goes on with as many as there are.
        endpoint: HOST:PORT where machines find each other; with more than one it is needed.
        job: tells this training from another one at the same endpoint.
        restarts: how often the processes are started again after one of them has failed.
    """

    processes: int = 1
    machines: str = "1"
    endpoint: str | None = None
    job: str = "masknet"
    restarts: int = 0

    def __post_init__(self) -> None:
        least, _, most = self.machines.partition(":")
        if not (least.isdecimal() and (most or least).isdecimal() and 0 < int(least) <= int(most or least)):
            raise InputError(f"--nnodes {self.machines}: give N or MIN:MAX, whole numbers from 1 up")
        if self.machines not in ("1", "1:1") and self.endpoint is None:
            raise InputError(f"--nnodes {self.machines} needs --rdzv-endpoint HOST:PORT, where the machines meet")
        host, _, port = (self.endpoint or "localhost:29400").rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise InputError(f"--rdzv-endpoint {self.endpoint}: give HOST:PORT")

    @classmethod
    def of_torchrun(cls) -> "Launch":
        """What torchrun tells its processes of the launch they belong to.

        Raises:
            InputError: it was started so that restarts fail.
        """
        told = os.environ
        if told["TORCHELASTIC_MAX_RESTARTS"] != "0" and told.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            raise InputError(f"torchrun --max-restarts needs {_STORE_APART}=1 in its environment")
        return cls(
            processes=int(told["LOCAL_WORLD_SIZE"]),
            machines=told["GROUP_WORLD_SIZE"],
            endpoint=f"{told['MASTER_ADDR']}:{told['MASTER_PORT']}",
            job=told["TORCHELASTIC_RUN_ID"],
            restarts=int(told["TORCHELASTIC_MAX_RESTARTS"]),
        )

    @property
    def is_needed(self) -> bool:
        """Whether this is more than one process that is started once."""
        return self.processes > 1 or self.endpoint is not None or self.restarts > 0

    @property
    def starts_again(self) -> bool:
        """Whether torchrun may start the processes again: after a failure, or when a machine comes or goes."""
        return self.restarts > 0 or ":" in self.machines

    @property
    def needs_shared_folder(self) -> bool:
        """Whether processes that know nothing of each other have to find the same checkpoints."""
        return self.starts_again or self.machines not in ("1", "1:1")

    def torchrun(self) -> list[str]:
        """The options that torchrun takes, up to the module that it is to run."""
        meeting = ["--standalone"]
        if self.endpoint is not None:
            meeting = [f"--rdzv-endpoint={self.endpoint}", f"--rdzv-id={self.job}", "--rdzv-backend=c10d"]
        counts = [f"--nproc-per-node={self.processes}", f"--max-restarts={self.restarts}"]
        return [f"--nnodes={self.machines}", *meeting, *counts, "-m", "--"]


def run_processes(launch: Launch, module: str, arguments: list[str]) -> int:
    """`python -m MODULE ARGUMENTS` in processes that train together: 0, or the exit code of the first that failed.

    SIGTERM and SIGINT reach every process here; they write a checkpoint and end, and the exit code is `STOPPED`.

    Args:
        launch: how many, and where.
        module: what each process runs.
        arguments: its command line; torchrun's own options may be among them and mean nothing.

    Raises:
        Failure: a process was killed, or other machines have not come or are gone.
    """
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    def stop(number: int, frame: FrameType | None) -> None:  # until torchrun does the same, once processes run
        raise SignalException("stopped", signal.Signals(number))

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // launch.processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_CHECKPOINT_SECONDS))
    if launch.starts_again:
        os.environ[_STORE_APART] = "1"
    # torchrun's own account of a failure repeats what the process has said. Its loggers have levels of their own.
    account = logging.getLogger("torch.distributed.elastic")
    account.addHandler(logging.NullHandler())
    account.propagate = False
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        run.run(run.parse_args([*launch.torchrun(), module, *arguments]))  # type: ignore[no-untyped-call]
    except SignalException:
        return STOPPED
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            hint = ", as the system does when memory runs out" if failure.exitcode == -signal.SIGKILL else ""
            raise Failure(f"process {rank} was killed by {failure.signal_name()}{hint}") from None
        return failure.exitcode
    except (RendezvousError, DistError) as error:
        raise Failure(_told_of_machines(error, launch)) from None
    return 0


def _told_of_machines(error: Exception, launch: Launch) -> str:
    """What has become of the other machines, in words."""
    from torch.distributed.elastic import rendezvous

    if isinstance(error, rendezvous.RendezvousTimeoutError):
        return f"fewer machines than --nnodes {launch.machines} have come to {launch.endpoint} in time"
    if isinstance(error, rendezvous.RendezvousClosedError):
        return f"training {launch.job!r} at {launch.endpoint} has ended on another machine"
    return f"the machine at {launch.endpoint}, where all machines meet, does not answer"


def is_worker() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def end_with_torchrun() -> None:
    """Ask the system for SIGTERM when torchrun is killed: it could not tell its processes, and they would train on."""
    if is_worker():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def let_rank_0_speak(*, others_know: bool = False) -> None:
    """Wait, on all processes of a machine but its first, for that one to tell of a fault that all found.

    Then torchrun ends this process. A fault that is this process's alone is told after the wait.

    Args:
        others_know: whether the fault began in another process: then all wait for that one, and longer.
    """
    if is_worker():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        is_first = os.environ["LOCAL_RANK"] == "0"
        time.sleep(_PATIENCE * ((not is_first) + 2 * others_know))
