"""The servers of the benchmark as processes: the endpoint, what one would write without it, and none of it all."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import httpx
import psutil

from training.bench.serve_ways import ARROW, JSON, MLFLOW, Way
from training.errors import Failure

ROOT = Path(__file__).parents[2]
RIVALS = ROOT / "tests" / "benchmarks" / "rivals"  # of a source tree; what is installed has none
START_SECONDS, STOP_SECONDS = 300.0, 30.0
_PORTS = (20_000, 32_000)


@dataclass
class Server:
    """A server on a free port of 127.0.0.1; `with` starts it and stops it with all its processes.

    Args:
        name: what it is.
        command: what starts it; {port} stands for the port.
        ready: the route that answers 200 once it is ready.
        log: the file of what it says.
        ways: how it is asked.
        ranks: whether it answers with the model's scores.
        has_stages: whether its /metrics tell where a request's time goes.
        environment: variables beside this process's.
    """

    name: str
    command: Sequence[str]
    ready: str
    log: Path
    ways: Sequence[Way] = (JSON,)
    ranks: bool = True
    has_stages: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def __enter__(self) -> "Server":
        self.port = free_port()
        command = [part.format(port=self.port) for part in self.command]
        self._out: IO[str] = self.log.open("w")
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **self.environment},
            stdout=self._out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it starts ends with it
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):  # all of it has ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._out.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        """Until it is ready; Failure where it ends before, or takes too long."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise Failure(f"{self.name} has ended: {self._last_words()}")
            try:
                if httpx.get(self.url + self.ready, timeout=5.0).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise Failure(f"{self.name} is not ready after {START_SECONDS:.0f} s: {self._last_words()}")

    def rss_mib(self) -> float:
        """Memory that its processes hold."""
        first = psutil.Process(self._process.pid)
        return float(sum(process.memory_info().rss for process in [first, *first.children(recursive=True)]) / 2**20)

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return " / ".join(line.strip() for line in lines if line.strip())[-500:]


def all_servers(folder: Path, bundle: Path, threads: int) -> tuple[list[Server], list[dict[str, str]]]:
    """The endpoint in both modes, HTTP alone and the rivals, `threads` for each; and the rivals that cannot run here.

    Args:
        folder: where logs go, and MLflow's copy of the model.
        bundle: what all of them serve.
    """
    servers = [_ours(folder, bundle, backend, threads) for backend in ("exact", "fast")]
    servers += [_floor(folder), _mlflow(folder, bundle)]
    reason = _why_no_rivals()
    skipped = []
    for name, module in (("FastAPI + PyTorch", "serving_eager"), ("FastAPI + ONNX Runtime", "serving_onnx")):
        if reason is None:
            servers.append(_rival(folder, bundle, name, module, threads))
        else:
            skipped.append({"name": name, "reason": reason})
    return servers, skipped


def _ours(folder: Path, bundle: Path, backend: str, threads: int) -> Server:
    """`masknet serve`, one worker."""
    command = [sys.executable, "-m", "training", "serve", str(bundle), "--port", "{port}"]
    command += ["--set", f"backend={backend}", "--set", f"threads={threads}"]
    log = folder / f"{backend}.log"
    return Server(f"masknet serve, {backend}", command, "/readyz", log, ways=(JSON, ARROW), has_stages=True)


def _rival(folder: Path, bundle: Path, name: str, module: str, threads: int) -> Server:
    """A script of tests/benchmarks/rivals."""
    command = [sys.executable, "-m", f"tests.benchmarks.rivals.{module}", str(bundle)]
    command += ["--port", "{port}", "--threads", str(threads)]
    return Server(name, command, "/healthz", folder / f"{module}.log")


def _mlflow(folder: Path, bundle: Path) -> Server:
    """`mlflow models serve` of the bundle in the form in which it is registered, one worker."""
    import mlflow

    spec = find_spec("serving.pyfunc")
    assert spec is not None
    assert spec.origin is not None
    model = folder / "mlflow-model"
    quiet = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    os.environ.update({name: os.environ.get(name, value) for name, value in quiet.items()})
    mlflow.pyfunc.save_model(
        path=str(model), python_model=spec.origin, artifacts={"bundle": str(bundle)}, pip_requirements=["mlflow"]
    )
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "-p", "{port}"]
    command += ["-h", "127.0.0.1", "--env-manager", "local"]
    here = str(Path(sys.executable).parent)  # where MLflow finds the uvicorn that it starts
    own = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}"}
    return Server("mlflow models serve", command, "/ping", folder / "mlflow.log", ways=(MLFLOW,), environment=own)


def _floor(folder: Path) -> Server:
    """HTTP alone."""
    command = [sys.executable, "-m", "uvicorn", "training.bench.serve_floor:app", "--port", "{port}"]
    return Server("HTTP alone", [*command, "--log-level", "warning"], "/", folder / "floor.log", ranks=False)


def _why_no_rivals() -> str | None:
    """Why the scripts of rivals cannot run, or None."""
    if not RIVALS.is_dir():
        return f"there is no {RIVALS.relative_to(ROOT)}: run it from a source tree"
    lacking = [name for name in ("fastapi", "uvicorn", "onnxruntime", "onnxscript") if find_spec(name) is None]
    return f"{lacking[0]} is not installed" if lacking else None


def free_port() -> int:
    """A port that nobody listens on now, below those that the system gives to outgoing connections meanwhile."""
    while True:
        with socket.socket() as probe:
            port = random.randrange(*_PORTS)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """What is started inside runs on these cores alone; where the system cannot do that, anywhere."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def shares() -> tuple[set[int], set[int]]:
    """The cores of the servers, and that of the load: one of its own where there are two."""
    if not hasattr(os, "sched_getaffinity"):
        return set(), set()
    cores = sorted(os.sched_getaffinity(0))
    return (set(cores), set(cores)) if len(cores) == 1 else (set(cores[:-1]), {cores[-1]})
