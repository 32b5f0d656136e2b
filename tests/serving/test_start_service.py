"""The start of a real service: nothing is answered before the golden rows are, and what is bad is told at once."""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from serving.bundle import Bundle
from tests.serving.conftest import Make
from tests.serving.running import PATIENCE, ROOT, Service
from tests.serving.test_life_following import broken
from tests.serving.test_swap_service import body, items_of, require_same
from training.bench.serve_servers import free_port

pytestmark = pytest.mark.long

INITIALIZED = "Service masknet initialized"  # BentoML's line after the service's __init__, which warms up


def test_nothing_is_answered_before_the_warm_up(make: Make, tmp_path: Path) -> None:
    bundle, early = make(), 0
    service = Service(tmp_path, str(bundle.path), "--set", "limits.drain_seconds=0")
    try:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and service.process.poll() is None:
            with suppress(httpx.TransportError):
                if httpx.get(f"{service.uri}/readyz", timeout=0.2).status_code == 200:
                    break
            with suppress(httpx.TransportError):
                answer = httpx.post(f"{service.uri}/rank", json=body("ann"), timeout=0.2)
                assert answer.status_code == 503 or INITIALIZED in service.told()
            early += 1
            time.sleep(0.05)
        assert INITIALIZED in service.told()
        assert early > 5
        require_same(service.rank(body("ann")), items_of(bundle, "ann"))
    finally:
        service.__exit__()


def other_weights(bundle: Bundle) -> list[str]:
    return [str(broken(bundle.path))]


def unchecked(bundle: Bundle) -> list[str]:
    return [str(bundle.path), "--set", "backend=fast"]


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (other_weights, "is damaged: the SHA-256 of members/00/embeddings/000.safetensors"),
        (unchecked, "backends.json"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_exit_code_2(
    make: Make, tmp_path: Path, made: Callable[[Bundle], list[str]], told: str
) -> None:
    command = [sys.executable, "-m", "training", "serve", *made(make()), "--port", str(free_port())]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert told in line
