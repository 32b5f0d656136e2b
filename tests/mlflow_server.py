"""A real `mlflow server` on loopback, for tests and measurements."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx

PATIENCE = 120  # seconds


class Server:
    """An MLflow server with a database and a folder of files behind it, which outlive it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["server", "--backend-store-uri", f"sqlite:///{self.home}/server.db", "--workers", "1"]
        words += ["--artifacts-destination", f"{self.home}/files", "--host", "127.0.0.1", "--port", str(self.port)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        log = (self.home / "log").open("ab")
        with log:
            command = [sys.executable, "-m", "mlflow", *words]
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.uri}/health").status_code == 200:
                    return
            time.sleep(0.2)
        raise AssertionError((self.home / "log").read_text())

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
