"""Tracking against a real `mlflow server` on loopback, which answers, is killed, was never there, or lets one wait."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.models import Model
from rich.console import Console

from tests.mlflow_server import PATIENCE, Server
from training.config import Config, load_config
from training.tracking import opening as tracking
from training.tracking import run as run_module
from training.tracking.opening import open_run

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("own_store")]

SCHEMA = """
name: clicks
label: {column: click}
fields:
  - {name: user_id, type: categorical}
  - {name: price, type: numeric}
"""


class Gate:
    """A way to a port on which nothing passes, in either direction, until it is opened."""

    def __init__(self, port: int) -> None:
        self.opened = threading.Event()
        self._port = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        self.opened.wait()
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self._port)) as server:
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            _copy(client, server)
            back.join()

    def close(self) -> None:
        self.opened.set()
        self._server.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while content := source.recv(1 << 16):
            target.sendall(content)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    return {"path": str(tmp_path), "schema": {"name": "clicks"}, "pipeline_digest": "ab" * 32}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """What stands for a bundle: of its files the registry reads the schema, for the model's signature."""
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    (tmp_path / "bundle" / "schema.yaml").write_text(SCHEMA)
    return tmp_path / "bundle"


def config_for(uri: str, tmp_path: Path, experiment: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(f"experiment: {experiment}\ntracking: {{registered_model: {experiment}}}\n")
    return load_config(path, [f"tracking.uri={uri}"])


def losses(first: int, count: int) -> list[float]:
    return [1 / step for step in range(first, first + count)]


def arrived(server: Server, run_id: str) -> list[tuple[int, float]]:
    client = mlflow.MlflowClient(server.uri)
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, "train_loss"))


def recorded(count: int) -> list[tuple[int, float]]:
    return [(step, 1 / step) for step in range(1, count + 1)]


def runs_in(server: Server, experiment: str) -> list[str]:
    client = mlflow.MlflowClient(server.uri)
    number = client.get_experiment_by_name(experiment).experiment_id
    return [run.info.run_id for run in client.search_runs([number])]


def wait_for(heard: StringIO, words: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while words not in heard.getvalue():
        assert time.monotonic() < deadline, heard.getvalue()
        time.sleep(0.1)


def test_numbers_files_and_the_model_arrive(server: Server, data: dict[str, Any], bundle: Path, tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    with open_run(config_for(server.uri, tmp_path, "answers"), data, tmp_path / "out", False, console=quiet) as run:
        run.series("train_loss", 1, losses(1, 2500))
        run.text("table_wise", "plan.txt")
        uri = run.register(bundle)
        assert run.register(bundle) == uri == "models:/answers/1"
    client = mlflow.MlflowClient(server.uri)
    found = client.get_run(run.run_id)
    assert arrived(server, run.run_id) == recorded(2500)
    assert found.data.params["model.kind"] == "parallel"
    assert found.info.status == "FINISHED"
    assert mlflow.artifacts.load_text(f"{found.info.artifact_uri}/plan.txt") == "table_wise"
    assert client.get_model_version_by_alias("answers", "candidate").run_id == run.run_id
    assert runs_in(server, "answers") == [run.run_id]
    folder = Path(mlflow.artifacts.download_artifacts("models:/answers/1", dst_path=str(tmp_path / "found")))
    assert (folder / "artifacts" / "bundle" / "manifest.json").read_text() == "{}"
    assert sorted(Model.load(str(folder)).signature.inputs.input_names()) == ["price", "user_id"]


def test_a_server_that_is_killed_and_comes_back_gets_everything(
    server: Server, data: dict[str, Any], tmp_path: Path
) -> None:
    heard = StringIO()
    console = Console(file=heard, width=10_000)
    with open_run(config_for(server.uri, tmp_path, "killed"), data, tmp_path / "out", False, console=console) as run:
        run.series("train_loss", 1, losses(1, 500))
        assert run.wait_until_sent(60)
        server.kill()
        run.series("train_loss", 501, losses(501, 1000))
        wait_for(heard, "MLflow takes no records")
        run.series("train_loss", 1501, losses(1501, 500))
        server.start()
    assert "MLflow is back and has every record" in heard.getvalue()
    assert arrived(server, run.run_id) == recorded(2000)
    assert runs_in(server, "killed") == [run.run_id]
    assert mlflow.MlflowClient(server.uri).get_run(run.run_id).info.status == "FINISHED"


def test_a_run_without_a_server_is_sent_and_registered_by_resuming_it(
    server: Server, data: dict[str, Any], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "SHORT_PATIENCE", 2.0)
    server.kill()
    heard = StringIO()
    console = Console(file=heard, width=10_000)
    config = config_for(server.uri, tmp_path, "absent")
    with open_run(config, data, tmp_path / "out", False, console=console) as run:
        run.series("train_loss", 1, losses(1, 1500))
        assert run.register(bundle) is None
    assert run.run_id == run.local_id
    assert f"--out {tmp_path / 'out'} --resume" in heard.getvalue()
    server.start()
    with open_run(config, data, tmp_path / "out", True, console=console) as later:
        assert later.register(bundle) == "models:/absent/1"
    assert arrived(server, later.run_id) == recorded(1500)
    assert runs_in(server, "absent") == [later.run_id]
    found = mlflow.MlflowClient(server.uri).get_run(later.run_id)
    assert found.data.tags["masknet.local_id"] == run.local_id.removeprefix("offline-")
    assert found.info.status == "FINISHED"


def test_a_server_that_lets_one_wait_holds_nothing_up_and_gets_everything(
    server: Server, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "START_PATIENCE", 0.2)
    gate = Gate(server.port)
    console = Console(quiet=True)
    config = config_for(gate.uri, tmp_path, "waits")
    with open_run(config, data, tmp_path / "out", False, console=console) as run:
        for step in range(1, 1001):
            run.metrics(step, {"train_loss": 1 / step})
        run.flush()
        assert run.run_id == run.local_id, "all was recorded, and the server has answered nothing yet"
        gate.opened.set()
        assert run.wait_until_sent(60)
        assert run.run_id != run.local_id
    gate.close()
    assert arrived(server, run.run_id) == recorded(1000)
    assert runs_in(server, "waits") == [run.run_id]
