"""What is measured of which server, and the process that sends the load."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from training.bench.serve_model import Request
from training.bench.serve_servers import ROOT, Server
from training.bench.serve_ways import Way
from training.errors import Failure


@dataclass(frozen=True)
class Case:
    """A server that is asked in one way.

    Args:
        name: of both.
        server: it runs.
        way: how it is asked and what it answers.
        files: the bodies of requests.
    """

    name: str
    server: Server
    way: Way
    files: tuple[str, ...]


def cases_of(servers: Sequence[Server], requests: Sequence[Request], folder: Path) -> list[Case]:
    """Every way of every server, with the requests' bodies written below `folder`."""
    cases = []
    for server in servers:
        for way in server.ways:
            cases.append(Case(f"{server.name}, {way.name}", server, way, _written(way, requests, folder)))
    return cases


def _written(way: Way, requests: Sequence[Request], folder: Path) -> tuple[str, ...]:
    place = folder / f"bodies {way.name}"
    place.mkdir(exist_ok=True)
    files = []
    for number, request in enumerate(requests):
        file = place / f"{number:03d}"
        file.write_bytes(way.body(request))
        files.append(str(file))
    return tuple(files)


class Loader:
    """The process that sends requests; `with` starts and ends it."""

    def __enter__(self) -> "Loader":
        command = [sys.executable, "-m", "training.bench.serve_load"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)

    def probe(self, case: Case, kind: Literal["closed", "busy", "open"], **rest: Any) -> dict[str, Any]:
        """Send requests as `serve_load` describes; Failure where the load's process has ended."""
        asked = {"kind": kind, "port": case.server.port, "path": case.way.path, "headers": dict(case.way.headers)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**asked, "files": case.files, **rest}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise Failure(f"the load on {case.name} has ended with exit code {self._process.wait(30)}")
        found: dict[str, Any] = json.loads(line)
        return found
