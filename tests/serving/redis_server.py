"""A real redis-server for tests, where there is one."""

import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest


class Redis:
    """A real redis-server on a free port, without a disk behind it."""

    def __init__(self, home: Path, *words: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url, self._home, self._words = f"redis://127.0.0.1:{self.port}/0", home, words
        self.process: subprocess.Popen[bytes] | None = None
        if shutil.which("redis-server") is None:
            pytest.skip("redis-server is missing (Debian's package redis-server)")

    def start(self) -> None:
        words = ["--port", str(self.port), "--save", "", "--dir", str(self._home), "--bind", "127.0.0.1", *self._words]
        self.process = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.02)
        raise AssertionError("redis-server does not listen")

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
