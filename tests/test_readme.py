"""The README's commands run as they stand, in its order, and its reference is the code's."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest
from typer.exceptions import TyperException
from typer.main import get_command

from serving.api.codes import codes_reference
from serving.reference import settings_reference
from tests.benchmarks.quality_page import PAGE, page
from training.cli import app
from training.reference import config_reference

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("masknet ")]
SERVE = next(command for command in COMMANDS if command.startswith("masknet serve "))
GATE = next(block for block in re.findall(r"```yaml\n(.*?)```", README, re.S) if block.startswith("slices:"))
CURL = next(block for block in BLOCKS if block.startswith("curl "))
SWAP = BLOCKS[-1].splitlines()
CLIENT = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S))
OWN_TARGETS = {"make demo", "make test"}


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    first = {line.partition("#")[0].strip() for line in BLOCKS[0].splitlines()}
    assert first == OWN_TARGETS
    for target in re.findall(r"`make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_references_are_the_codes() -> None:
    assert config_reference() in (ROOT / "training" / "README.md").read_text()
    assert settings_reference() in (ROOT / "serving" / "README.md").read_text()
    assert codes_reference() in (ROOT / "serving" / "README.md").read_text()


def test_quality_is_what_was_measured() -> None:
    found = json.loads((ROOT / "tests" / "benchmarks" / "results" / "quality.json").read_text())
    assert PAGE.read_text() == page(found["rows"], found["seeds"])


def test_schema_in_the_readme_is_part_of_the_file() -> None:
    shown = re.findall(r"  - \{name.*\}", README)
    assert len(shown) == 4
    assert set(shown) <= set((ROOT / "features" / "schemas" / "movielens.yaml").read_text().splitlines())


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, raw_rows: Path) -> Path:
    """The project's folder after `make demo`, as far as the commands read it."""
    home = tmp_path_factory.mktemp("readme")
    for room in ("features", "training"):
        (home / room).symlink_to(ROOT / room)
    (home / "runs" / "demo").mkdir(parents=True)
    (home / "runs" / "demo" / "movielens.parquet").write_bytes(raw_rows.read_bytes())
    # As the README has it, and laxer in what its 28 test users are too few for.
    (home / "gate.yaml").write_text(GATE + "max_calibration_error: 0.5\nmax_ece: 0.3\n")
    pl.read_parquet(raw_rows).head(40).write_parquet(home / "runs" / "demo" / "ranked.parquet")
    return home


def start(home: Path, command: str) -> subprocess.Popen[str]:
    words = shlex.split(command)
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db", "PYTHONPATH": str(ROOT)}
    store["XDG_CACHE_HOME"] = str(home / "cache")
    return subprocess.Popen(
        [sys.executable, "-m", "training", *words[1:]],
        cwd=home,
        env={**os.environ, **store},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_commands_are_understood() -> None:
    words = [shlex.split(command)[1:] for command in COMMANDS]
    assert [name for name, *_ in words] == [
        "prepare",
        "prepare",
        *4 * ["train"],
        "evaluate",
        "promote",
        "score",
        "prepare",
        "evaluate",
        "tune",
        "ablate",
        "serve",
        "promote",
        "promote",
    ]
    commands: dict[str, Any] = vars(get_command(app))["commands"]
    for name, *given in words:
        commands[name].make_context(name, given)
    with pytest.raises(TyperException, match="No such option: --seed"):
        commands["train"].make_context("train", [*words[2][1:], "--seed", "2"])


@pytest.mark.long
def test_commands_run_in_order(home: Path) -> None:
    for command in COMMANDS[: COMMANDS.index(SERVE)]:
        process = start(home, command)
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, f"{command}\n{error}"
    assert (home / "runs" / "report" / "report.html").is_file()


@pytest.mark.long
def test_serve_both_curl_lines_a_swap_and_a_rollback(home: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    process = start(home, f"{SERVE.replace('3000', port)} --set follow.interval_seconds=0.5")
    try:
        assert process.stdout is not None
        process.stdout.readline()
        printed = process.stdout.readline()
        wait_until_ready(f"http://127.0.0.1:{port}/readyz")
        for command in (printed, CURL.replace("3000", port)):
            answer = post_as_curl_would(command)
            assert [set(item) for item in answer["items"]] == [{"index", "score"}] * len(answer["items"])
            assert answer["items"]
        found: dict[str, Any] = {}
        exec(CLIENT.replace("3000", port), found)
        assert found["ranking"].model.version == answer["model"]["version"]
        assert len(found["ranking"].items) == 1
        swap_and_roll_back(home, port, answer["model"]["version"])
    finally:
        process.terminate()
        process.communicate(timeout=30)


def swap_and_roll_back(home: Path, port: str, before: str) -> None:
    """Each `masknet promote` changes the version that the curl line after it shows, and that of /rank's replies."""
    versions = [before]
    for promote, look in zip(SWAP[::2], SWAP[1::2], strict=True):
        done = start(home, promote)
        _, error = done.communicate(timeout=300)
        assert done.returncode == 0, f"{promote}\n{error}"
        words = shlex.split(look.replace("3000", port))
        assert words[:2] == ["curl", "-s"]
        for _ in range(300):
            shown = httpx.get(words[2]).json()["model"]["version"]
            if shown != versions[-1]:
                break
            time.sleep(0.2)
        assert post_as_curl_would(CURL.replace("3000", port))["model"]["version"] == shown
        versions.append(shown)
    assert versions == [before, "1", before] != ["1"] * 3


def wait_until_ready(url: str) -> None:
    for _ in range(300):
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(f"{url} is not ready after a minute")


def post_as_curl_would(command: str) -> dict[str, Any]:
    """Send what the curl line sends; curl itself is not on every machine."""
    words = shlex.split(command)
    assert words[:2] == ["curl", "-s"]
    url, header, body = words[2], words[words.index("-H") + 1], words[words.index("-d") + 1]
    name, _, value = header.partition(": ")
    answer = httpx.post(url, content=body.encode(), headers={name: value})
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = json.loads(answer.text)
    return result
