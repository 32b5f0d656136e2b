"""`prepare` on Ray: the same files as the local engine's, also where workers and a node die on the way."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from features import units
from features.files import hash_tree
from features.prepare import prepare
from features.schema import load_schema
from features.splits import SplitRule

ROOT = Path(__file__).parent.parent.parent
SCHEMA = """
name: t
label: {column: y}
time: at
csv: {separator: ","}
negative_sampling: {rate: 0.7}
fields:
  - {name: a, type: categorical}
  - {name: b, type: list, separator: "|", share_with: a}
  - {name: n, type: numeric, buckets: 6}
  - {name: v, type: numeric, encoder: standard}
  - {name: x, type: cross, of: [a, b], buckets: 100}
"""


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    rows = [
        f"{n * 7919 % 97},{n % 5}|{n % 11},{n % 100},{n * n % 13},{n % 3 // 2},{n * 37 % 1000}" for n in range(20_000)
    ]
    rows[5000] = "broken"
    path = tmp_path / "raw.csv"
    path.write_text("a,b,n,v,y,at\n" + "\n".join(rows) + "\n")
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    return path


def environment() -> dict[str, str]:
    # Workers that Ray starts must find the project; and Ray must leave the fork of a threaded pytest alone.
    return {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.mark.long
def test_two_nodes_with_dying_workers_give_the_local_engines_files(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = [sys.executable, str(Path(__file__).parent / "ray_cluster.py")]
    answer = subprocess.run(
        [*script, str(tmp_path / "schema.yaml"), str(raw), str(tmp_path / "ray")],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    told = re.search(r"killed (\d+) nodes (\d+)", answer.stdout)
    assert told is not None
    assert (int(told[1]), int(told[2])) == (3, 1)
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    rule = SplitRule.parse("time:0.8,0.1,0.1")
    schema = load_schema(tmp_path / "schema.yaml")
    done = prepare(schema, {"input": [str(raw)]}, tmp_path / "local", split=rule, max_bad_rows=0.5)
    assert done.bad_rows == 1
    assert hash_tree(tmp_path / "ray") == hash_tree(tmp_path / "local")


@pytest.mark.long
def test_the_command_takes_ray(tmp_path: Path, raw: Path) -> None:
    """Through the command line: an input error is one line here too, and leaves nothing behind."""
    command = [sys.executable, "-m", "training", "prepare", "schema.yaml", "--input", str(raw), "--out", "data"]
    command += ["--split", "random:0.8,0.1,0.1", "--engine", "ray", "--max-bad-rows", "0", "--json"]
    answer = subprocess.run(
        command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert re.search(r"masknet: 1 of 20000 rows are bad.*raw\.csv:5002 1 columns where 6", answer.stderr)
    assert "Traceback" not in answer.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw.csv", "schema.yaml"]
