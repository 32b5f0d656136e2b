"""The main job as a user runs it: processes, files and HTTP, on a slice of real data."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import polars as pl
import pytest

from features import movielens

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "training" / "configs" / "movielens.yaml"
SMALL = ["--set", "model.block_width=16", "--set", "train.epochs=2", "--set", "train.batch_size=512"]


class Home:
    """A working directory with an MLflow store of its own, in which commands are run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = f"sqlite:///{path}/mlflow.db"

    def start(self, *words: str) -> subprocess.Popen[str]:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
        return subprocess.Popen(
            [sys.executable, "-m", "training", *words],
            cwd=self.path,
            env={
                **environment,
                "MLFLOW_TRACKING_URI": self.store,
                "PYTHONPATH": str(ROOT),
                "XDG_CACHE_HOME": f"{self.path}-cache",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str, str]:
        process = self.start(*words)
        out, error = process.communicate(timeout=120)
        return process.returncode, out, error

    def json(self, *words: str) -> dict[str, Any]:
        code, out, error = self.run(*words, "--json")
        assert code == 0, error
        assert "Traceback" not in error
        result: dict[str, Any] = json.loads(out)
        return result

    def refused(self, *words: str) -> str:
        """The one line that a mistake ends with."""
        code, out, error = self.run(*words)
        assert code == 2, (code, out, error)
        assert out == ""
        assert "Traceback" not in error
        (line,) = error.strip().splitlines()
        assert line.startswith("masknet: ")
        return line


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, raw_rows: Path) -> Home:
    """A home with raw rows, a prepared data set, a trained and promoted model."""
    home = Home(tmp_path_factory.mktemp("home"))
    (home.path / "clicks.parquet").write_bytes(raw_rows.read_bytes())
    words = ["--input", "clicks.parquet", "--split", "time:0.8,0.1,0.1", "--out", "data"]
    prepared = home.json("prepare", str(movielens.SCHEMA), *words)
    assert prepared["rows"] == {"train": 4800, "valid": 600, "test": 600}
    assert prepared["quarantined"] == 0
    trained = home.json("train", str(CONFIG), "--data", "data", "--out", "run", *SMALL)
    assert trained["model_uri"] == "models:/movielens-ranker/1"
    assert json.loads((home.path / "run" / "result.json").read_text())["metrics"] == trained["metrics"]
    (home.path / "gate.yaml").write_text("max_calibration_error: 0.5\nmax_ece: 0.3\n")  # two epochs calibrate no model
    promoted = home.json("promote", "models:/movielens-ranker@candidate", "--data", "data", "--config", "gate.yaml")
    assert [check["name"] for check in promoted.pop("checks")] == ["rows", "calibration", "ece"]
    assert promoted == {
        "model_uri": "models:/movielens-ranker/1",
        "alias": "champion",
        "replaced": None,
        "reason": "calibrated on test split of data, and there was no champion",
    }
    return home


@pytest.fixture(scope="module")
def served(home: Home) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    port = free_port()
    process = home.start("serve", "models:/movielens-ranker@champion", "--port", str(port))
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{address}/readyz").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.2)
    else:
        process.kill()
        pytest.fail(f"the service did not start: {process.communicate()[1][-2000:]}")
    yield address, process
    if process.poll() is None:
        process.kill()
    process.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_the_same_rows_score_the_same_everywhere(home: Home, served: tuple[str, subprocess.Popen[str]]) -> None:
    """/rank, /predict, masknet score and masknet evaluate on the test split, to 1e-6 in probability."""
    address, _ = served
    lines = [line - 1 for line in pl.read_parquet(home.path / "data" / "test")["_line"]]
    rows = pl.read_parquet(home.path / "clicks.parquet")[lines].with_columns(pl.col("year").cast(pl.Int64))
    rows.write_parquet(home.path / "test.parquet")
    scored = home.json("score", "models:/movielens-ranker@champion", "--input", "test.parquet", "--out", "scored")
    assert scored["rows"] == 600
    table = pl.read_parquet(home.path / "scored")
    assert table.drop("score").equals(rows)
    batch_N = table["score"].to_numpy()

    fields = rows.select("user_id", "age", "gender", "occupation", "item_id", "title", "year", "genres")
    predicted = httpx.post(f"{address}/predict", json={"rows": fields.to_dict(as_series=False)}).json()
    assert predicted["model"] == {"name": "movielens-ranker", "version": "1"}
    np.testing.assert_allclose(predicted["scores"], batch_N, rtol=0, atol=1e-6)

    user = rows["user_id"].value_counts(sort=True)["user_id"][0]
    own = np.flatnonzero((rows["user_id"] == user).to_numpy())
    context = fields.select("user_id", "age", "gender", "occupation").row(int(own[0]), named=True)
    films = fields[own.tolist()].select("item_id", "title", "year", "genres")
    body = {"context": context, "candidates": films.to_dicts(), "top_k": 1000}
    items = httpx.post(f"{address}/rank", json=body).json()["items"]
    assert [item["score"] for item in items] == sorted((item["score"] for item in items), reverse=True)
    found = {own[item["index"]]: item["score"] for item in items}
    np.testing.assert_allclose([found[row] for row in own], batch_N[own], rtol=0, atol=1e-6)

    evaluated = home.json("evaluate", "models:/movielens-ranker@champion", "--data", "data", "--out", "report")
    label_N = (rows["rating"] >= 4).to_numpy()
    loss = -np.mean(np.log(np.where(label_N, batch_N, 1 - batch_N)))
    assert evaluated["metrics"]["logloss"] == pytest.approx(float(loss), abs=1e-6)
    assert set(evaluated["baselines"]) == {"base rate", "logistic regression"}
    report = (home.path / "report" / "report.html").read_text()
    assert report.count("<svg") == 6
    assert not re.search(r"<script|<link|@import|(?:src|href)=.https?:", report)
    client = mlflow.MlflowClient(home.store)
    run = json.loads((home.path / "run" / "result.json").read_text())["run_id"]
    names = {artifact.path for artifact in client.list_artifacts(run, "report/test")}
    assert names == {f"report/test/{file}" for file in ("report.html", "metrics.json", "slices.csv")}


def test_the_service_around_the_routes(served: tuple[str, subprocess.Popen[str]]) -> None:
    address, _ = served
    assert httpx.get(f"{address}/livez").status_code == 200
    assert "bentoml" in httpx.get(f"{address}/metrics").text
    assert "/rank" in httpx.get(f"{address}/docs.json").json()["paths"]
    assert httpx.get(f"{address}/model").json()["model"]["version"] == "1"
    answer = httpx.post(f"{address}/rank", content=b"{nope", headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_json")
    assert httpx.get(f"{address}/nothing").json()["error"]["code"] == "not_found"
    assert httpx.put(f"{address}/rank").status_code == 405


def test_a_taken_port_is_told(home: Home, served: tuple[str, subprocess.Popen[str]]) -> None:
    port = served[0].rpartition(":")[2]
    line = home.refused("serve", "run/bundle", "--port", port)
    assert f"port {port} on 127.0.0.1 cannot be used" in line


@pytest.mark.long
def test_the_gate_has_an_exit_code_and_a_way_back(home: Home) -> None:
    (home.path / "strict.yaml").write_text("max_ece: 0\nmin_rows: 1000\n")
    words = ["promote", "models:/movielens-ranker/1", "--alias", "strict"]
    code, out, error = home.run(*words, "--input", "clicks.parquet", "--config", "strict.yaml", "--json")
    assert (code, out) == (1, "")  # 6,000 rows are enough; no model is calibrated so well
    *table, line = error.strip().splitlines()
    assert line.startswith("masknet: models:/movielens-ranker/1 does not become strict on clicks.parquet: ece ")
    assert any("│ ece" in row and "│ no" in row for row in table)
    forced = home.json(*words, "--force", "there is no other")
    assert (forced["reason"], forced["checks"]) == ("forced: there is no other", [])
    rollback = home.refused("promote", "models:/movielens-ranker", "--alias", "strict", "--rollback")
    assert "is the first strict: there is none before it" in rollback


@pytest.mark.long
def test_mistakes_are_one_line_and_leave_nothing(home: Home, tmp_path: Path) -> None:
    before = sorted(path.name for path in home.path.iterdir())
    schema = str(movielens.SCHEMA)
    rows = ["--input", "clicks.parquet", "--split", "time:0.8,0.1,0.1"]
    assert "elsewhere does not exist" in home.refused("train", str(CONFIG), "--data", "elsewhere")
    assert "unknown key" in home.refused("train", str(CONFIG), "--data", "data", "--set", "model.deep=1")
    assert "data exists already" in home.refused("prepare", schema, *rows, "--out", "data")
    assert "names no file" in home.refused("prepare", schema, "--input", "x.csv", "--split", rows[3], "--out", "d2")
    assert "give either" in home.refused("prepare", schema, "--input", "clicks.parquet", "--out", "d2")
    assert "'nobody'" in home.refused("evaluate", "nobody", "--data", "data")
    assert "not in the registry" in home.refused("serve", "models:/nobody@champion")
    assert "split 'tset'" in home.refused("evaluate", "run/bundle", "--data", "data", "--split", "tset")
    itself = ("--data", "data", "--against", "run/bundle")
    assert "is the model run/bundle itself" in home.refused("evaluate", "run/bundle", *itself)
    assert sorted(path.name for path in home.path.iterdir()) == before


def test_sigterm_stops_the_service(served: tuple[str, subprocess.Popen[str]]) -> None:
    _, process = served
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM)
    assert "curl -s http://127.0.0.1" in out
    assert "Traceback" not in error
