"""Requests made up from the service's own description: every answer is one that is described, and none is a failure."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.running import Service

pytestmark = pytest.mark.long

HERE = Path(__file__).parent
REQUESTS = 10_000
EXAMPLES = 4_000  # per route; both that take bodies get as many


def test_nothing_is_found_in_ten_thousand_requests(service: Service, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "st"), "--config-file", str(HERE / "schemathesis.toml"), "run"]
    options = ["--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES), "--continue-on-failure"]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": str(HERE / "schemathesis_hooks.py")}
    environment.pop("PYTHONWARNINGS", None)
    done = subprocess.run(
        [*command, f"{service.uri}/docs.json", *options, "--seed", "1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    generated = re.search(r"([\d,]+) generated", done.stdout)
    assert generated is not None, done.stdout
    assert int(generated[1].replace(",", "")) >= REQUESTS
    for route in ("/rank", "/predict"):  # not refusals alone
        service.wait_for(lambda route=route: service.metric("masknet_requests_total", f'route="{route}"', '"200"') > 0)
    assert service.metric("masknet_requests_total", 'status="500"') == 0
