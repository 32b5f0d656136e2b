"""`masknet serve` as a process of its own on a free port; what is sent to it, and what its errors are like."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa

from serving.api.arrow import METADATA

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 180.0  # seconds
ARROW = "application/vnd.apache.arrow.stream"


class Service:
    """A served model; its output goes to a file."""

    def __init__(self, home: Path, *words: str, **environment: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.uri, self.log = f"http://127.0.0.1:{port}", home / f"serve-{port}.log"
        given = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
        given |= {
            "PYTHONPATH": f"{ROOT}:{given.get('PYTHONPATH', '')}",
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(home / "cache"),
        } | environment
        command = [sys.executable, "-m", "training", "serve", *words, "--port", str(port)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=home, env=given, stdout=log, stderr=log)

    def __enter__(self) -> "Service":
        self.wait_for(lambda: httpx.get(f"{self.uri}/readyz").status_code == 200)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def wait_for(self, comes_true: Any) -> None:
        """Until it is so; the service's output if it ends before or takes too long."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(httpx.TransportError):
                if comes_true():
                    return
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(self.log.read_text()[-5000:])

    def rank(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = httpx.post(f"{self.uri}/rank", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def life(self) -> dict[str, Any]:
        """What /model tells of versions."""
        found: dict[str, Any] = httpx.get(f"{self.uri}/model", timeout=30).json()
        return {**found["life"], "version": found["model"]["version"]}

    def metric(self, name: str, *labels: str) -> float:
        """A metric's value, summed over all that have these labels; 0 where nothing was counted."""
        lines = httpx.get(f"{self.uri}/metrics", timeout=30).text.splitlines()
        mine = [line for line in lines if line.startswith(name) and all(label in line for label in labels)]
        return sum(float(line.rpartition(" ")[2]) for line in mine)

    def told(self) -> str:
        return self.log.read_text()


def checked(answer: httpx.Response, status: int, code: str, location: str | None = None) -> None:
    """The one body, and nothing of the server's inside."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "location"}
    assert (error["code"], error["location"]) == (code, location)
    assert answer.headers["x-request-id"]
    assert not any(word in answer.text for word in ("Traceback", ".py", "/work", "/tmp", "site-packages"))


def stream(columns: dict[str, Any], rest: Any, **options: Any) -> bytes:
    """An Arrow IPC stream of the columns, with the rest of the body in its metadata."""
    table = pa.table(columns).replace_schema_metadata({METADATA: json.dumps(rest).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content
