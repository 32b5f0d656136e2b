"""Requests made up from the service's own description: every answer is one that is described, and none is a failure."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.serving.running import Service

pytestmark = pytest.mark.long

HERE = Path(__file__).parent
REQUESTS = 10_000
ANY, WHOLE = 1500, 1500  # requests of each kind of body, at the most
ANSWERED = 0.2  # the least share of a route's requests that get scores; most are made to be wrong
ROUTES = ("/rank", "/predict")


def made_up(service: Service, home: Path, *options: str, **variables: str) -> int:
    """The number of requests, in which nothing is found."""
    command = [str(Path(sys.executable).parent / "st"), "--config-file", str(HERE / "schemathesis.toml"), "run"]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": str(HERE / "schemathesis_hooks.py"), **variables}
    environment.pop("PYTHONWARNINGS", None)
    done = subprocess.run(
        [*command, f"{service.uri}/docs.json", *options, "--continue-on-failure", "--seed", "1"],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    generated = re.search(r"([\d,]+) generated", done.stdout)
    assert generated is not None, done.stdout
    return int(generated[1].replace(",", ""))


def counted(service: Service) -> dict[tuple[str, str], float]:
    """Answers so far by route, and by what their status begins with."""
    time.sleep(1)  # counts come half a second late
    return {
        (route, status): service.metric("masknet_requests_total", f'route="{route}"', f'status="{status}')
        for route in ROUTES
        for status in ("", "2", "5")
    }


def test_nothing_is_found_in_ten_thousand_requests(every_service: Service, tmp_path: Path) -> None:
    """As the description has them, right and wrong ones; and those made whole that it cannot tell from whole ones."""
    before = counted(every_service)
    options = ("--phases", "examples,coverage,fuzzing", "--max-examples", str(ANY))
    count = made_up(every_service, tmp_path, *options)
    options = ("--phases", "examples,fuzzing", "--mode", "positive", "--max-examples", str(WHOLE))
    count += made_up(every_service, tmp_path, *options, COMPLETE="1")
    assert count >= REQUESTS
    done = {key: total - before[key] for key, total in counted(every_service).items()}
    for route in ROUTES:
        assert done[route, "2"] >= ANSWERED * done[route, ""] > 0, done
        assert done[route, "5"] == 0
