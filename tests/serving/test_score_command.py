"""`masknet score` as a process: killed and gone on with, stopped, on Ray, and in bounded memory."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from features.files import hash_tree
from serving.bundle import Bundle, load_bundle
from tests.serving.every_kind import CONTEXT, PLAIN, in_rows, write_every_kind

ROOT = Path(__file__).parent.parent.parent
ROWS, UNIT_BYTES = 60_000, 8_000  # some seventy units
# the command with smaller units, so that there are many
SCRIPT = f"from features import units; units.UNIT_BYTES = {UNIT_BYTES}; from training.cli import main; main()"

pytestmark = pytest.mark.long


@pytest.fixture
def bundle(make: Callable[..., Bundle]) -> Bundle:
    return make("model", 1)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    random.seed(1)
    lines = [f"{random.choice(['ann', 'bob', 'eve'])},{random.randrange(90)},{n}" for n in range(ROWS)]
    (tmp_path / "rows.csv").write_text("user,item,place\n" + "\n".join(lines) + "\n")
    return tmp_path / "rows.csv"


def start(bundle: Bundle, rows: Path, out: Path, *words: str, script: str = SCRIPT) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", script, "score", str(bundle.path), "--input", str(rows), "--out", str(out)]
    return subprocess.Popen(
        [*command, *words], env=environment, cwd=out.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, log = process.communicate(timeout=180)
    assert process.returncode == code, log[-3000:]
    return out, log


def parts(out: Path) -> set[str]:
    return {path.name for path in (out.with_name(f".{out.name}.partial") / "parts").glob("part-*")}


def wait_for_more(process: subprocess.Popen[str], out: Path, more: int) -> None:
    """Until so many parts have been added, or the process has ended."""
    before = len(parts(out))
    while process.poll() is None and len(parts(out)) < before + more:
        time.sleep(0.002)


def test_a_scoring_killed_again_and_again_ends_bit_for_bit_the_same(bundle: Bundle, rows: Path, tmp_path: Path) -> None:
    finish(start(bundle, rows, tmp_path / "whole"))
    out = tmp_path / "out"
    at_kill = []
    for kill in range(4):
        process = start(bundle, rows, out, *(["--resume"] if kill else []))
        wait_for_more(process, out, 8)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL, "it ended before it could be killed"
        process.communicate()
        assert not out.exists()
        at_kill.append(len(parts(out)))
    assert at_kill == sorted(set(at_kill))  # it got on each time
    told, log = finish(start(bundle, rows, out), code=2)
    assert "go on with --resume, or remove it" in log
    told, _ = finish(start(bundle, rows, out, "--resume", "--json"))
    assert json.loads(told).keys() == {"out", "rows", "seconds"}
    assert json.loads(told)["rows"] == ROWS
    assert hash_tree(out) == hash_tree(tmp_path / "whole")
    table = pq.read_table(out)
    assert [int(place) for place in table["place"].to_pylist()] == list(range(ROWS))
    expected = load_bundle(bundle.path).scorer.score(pd.read_csv(rows)[["user", "item"]])
    np.testing.assert_allclose(table["score"].to_numpy(), expected, rtol=0, atol=1e-7)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_how_to_go_on(bundle: Bundle, rows: Path, tmp_path: Path, number: signal.Signals) -> None:
    out, more = tmp_path / "out", 10  # times the rows, so that a signal comes long before the end
    header, *lines = rows.read_text().splitlines()
    rows.write_text("\n".join([header, *lines * more]) + "\n")
    process = start(bundle, rows, out)
    wait_for_more(process, out, 3)
    process.send_signal(number)
    _, log = finish(process, code=75)
    assert f"stopped; go on with the same command and --out {out} --resume" in log
    assert "Traceback" not in log
    assert not out.exists()
    finish(start(bundle, rows, out, "--resume"))
    assert pq.read_table(out).num_rows == more * ROWS


def test_a_wrong_row_is_one_line(bundle: Bundle, rows: Path, tmp_path: Path) -> None:
    lines = rows.read_text().splitlines()
    lines[50_000] = "ann,x,5"
    rows.write_text("\n".join(lines))
    _, log = finish(start(bundle, rows, tmp_path / "out", "--columns", "place"), code=2)
    assert re.search(r"masknet: 1 of \d+ rows are bad, above --max-bad-rows 0.0: .*rows.csv:50001 column 'item': ", log)
    assert "Traceback" not in log
    words = ["--columns", "place", "--max-bad-rows", "0.001", "--resume"]
    told, _ = finish(start(bundle, rows, tmp_path / "out", *words))
    assert told == f"{tmp_path / 'out'}: 59,999 rows; 1 set aside\n"
    assert pq.read_table(tmp_path / "out").column_names == ["place", "score"]


def test_ray_gives_the_same_files_and_goes_on_with_what_was_begun_here(
    bundle: Bundle, rows: Path, tmp_path: Path
) -> None:
    finish(start(bundle, rows, tmp_path / "local"))
    process = start(bundle, rows, tmp_path / "ray")
    wait_for_more(process, tmp_path / "ray", 20)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(parts(tmp_path / "ray")) < 60
    told, _ = finish(start(bundle, rows, tmp_path / "ray", "--resume", "--engine", "ray", "--json"))
    assert json.loads(told)["rows"] == ROWS
    assert hash_tree(tmp_path / "ray") == hash_tree(tmp_path / "local")


def test_memory_does_not_follow_the_rows(bundle: Bundle, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from serving.bundle import load_bundle; "
        "from serving.scoring.files import score_files; "
        "score_files(load_bundle(Path(sys.argv[2])), [sys.argv[4]], Path(sys.argv[6])); "
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    )
    peaks = []
    for copies in (1, 12):  # 16 MiB of text, which is read at once, and 190
        path = tmp_path / f"rows-{copies}.csv"
        block = "".join(f"ann,{n % 60},{n:050d}\n" for n in range(280_000))
        with path.open("w") as file:
            file.write("user,item,place\n")
            for _ in range(copies):
                file.write(block)
        told, _ = finish(start(bundle, path, tmp_path / f"out-{copies}", script=script))
        peaks.append(int(told))
        assert (
            sum(pq.read_metadata(p).num_rows for p in (tmp_path / f"out-{copies}").glob("part-*")) == 280_000 * copies
        )
    assert peaks[1] - peaks[0] < 500_000, peaks  # KiB; the larger file's rows alone take 900,000 as columns and scores


def test_a_number_too_large_to_be_scored_ends_it_or_is_set_aside(tmp_path: Path) -> None:
    bundle = load_bundle(write_every_kind(tmp_path / "bundle"))
    frame = pd.DataFrame([row | CONTEXT | {"seen": pd.Timestamp("2024-05-05")} for row in in_rows(PLAIN)] * 10)
    frame.loc[7, "price"] = 1e30
    frame.to_parquet(tmp_path / "rows.parquet")
    log = finish(start(bundle, tmp_path / "rows.parquet", tmp_path / "out"), 2)[1]
    (told,) = (line for line in log.splitlines() if "bad" in line)
    assert told.endswith("1 rows like " + str(tmp_path / "rows.parquet") + ":8 its values are too large to be scored")
    assert "Traceback" not in log
    again = start(bundle, tmp_path / "rows.parquet", tmp_path / "out", "--max-bad-rows", "0.5", "--resume")
    assert "29 rows; 1 set aside" in "".join(finish(again))
    expected = bundle.scorer.score(frame.drop(index=7))
    np.testing.assert_allclose(pq.read_table(tmp_path / "out")["score"].to_numpy(), expected, rtol=0, atol=1e-7)
