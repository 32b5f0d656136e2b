"""What a run records reaches MLflow whole and once, now or later, and nothing about MLflow stops a training."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from io import StringIO
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow.entities import Run as MlflowsRun
from rich.console import Console

from features.errors import InputError
from serving.bundle import load_bundle
from training.config import Config, load_config
from training.errors import Stopped
from training.tracking import opening as tracking
from training.tracking import run as run_module
from training.tracking import sender as sender_module
from training.tracking.environment import git_revision, run_name
from training.tracking.mlflow_run import MlflowRun
from training.tracking.opening import attach_report, open_run
from training.tracking.outages import is_mistake, is_refusal
from training.tracking.run import Run
from training.tracking.sender import Sender
from training.tracking.spool import Spool
from training.train import train

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _quick(own_store: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for an MLflow that is away, and other tests find their own store."""
    monkeypatch.setattr(run_module, "SHORT_PATIENCE", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def about(tmp_path: Path) -> dict[str, Any]:
    """As much of a prepared data set as tracking looks at."""
    path = tmp_path / "prepared"
    path.mkdir()
    (path / "profile.json").write_text('{"splits": {"train": {"rows": 4800}, "valid": {"rows": 600}}, "fields": {}}')
    return {"path": str(path), "schema": {"name": "clicks"}, "pipeline_digest": "ab" * 32, "files": {"part": "hash"}}


@pytest.fixture
def store(config: Config) -> str:
    """The store of this process's tests."""
    return os.environ["MLFLOW_TRACKING_URI"]


def at(uri: str, tmp_path: Path) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text("experiment: tracked\ntracking: {registered_model: tracked}\n")
    return load_config(path, [f"tracking.uri={uri}"])


def a_run(uri: str, about: dict[str, Any], out: Path, *, resume: bool = False, console: Console = QUIET) -> Run:
    return open_run(at(uri, out.parent), about, out, resume, console=console)


def history(run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in mlflow.MlflowClient().get_metric_history(run_id, name))


def runs_of(local_id: str) -> list[MlflowsRun]:
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tracked").experiment_id
    return list(client.search_runs([experiment], f"tags.`masknet.local_id` = '{local_id.removeprefix('offline-')}'"))


def a_closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_everything_that_is_recorded_arrives(store: str, about: dict[str, Any], tmp_path: Path) -> None:
    report = tmp_path / "out" / "report"
    with a_run(store, about, tmp_path / "out") as run:
        run.series("train_loss", 1, [0.75, 0.5, 0.25])
        run.metrics(3, {"auc": 0.5, "none": None, "nan": float("nan"), "ndcg@10": 0.25})
        run.tags({"masknet.extra": "yes"})
        run.text("table_wise", "plan.txt")
        report.mkdir()
        (report / "a.html").write_text("page")
        run.artifacts(report, "report/test")
    found = mlflow.MlflowClient().get_run(run.run_id)
    assert history(run.run_id, "train_loss") == [(1, 0.75), (2, 0.5), (3, 0.25)]
    assert history(run.run_id, "auc") == [(3, 0.5)]
    assert history(run.run_id, "ndcg_at_10") == [(3, 0.25)], "MLflow refuses @"
    assert "none" not in found.data.metrics
    assert found.data.metrics["nan"] != found.data.metrics["nan"]
    assert found.data.metrics["system/process_memory_megabytes"] > 100
    assert found.data.params["model.block_width"] == "400"
    assert found.data.tags["masknet.extra"] == "yes"
    assert found.data.tags["masknet.pipeline_digest"] == about["pipeline_digest"]
    assert found.info.run_name == run_name(at(store, tmp_path), run.local_id)
    assert found.info.status == "FINISHED"
    (seen,) = found.inputs.dataset_inputs
    assert (seen.dataset.name, seen.dataset.digest) == ("clicks", about["pipeline_digest"][:36])
    load = mlflow.artifacts.load_text
    where = found.info.artifact_uri
    assert load(f"{where}/plan.txt") == "table_wise"
    assert load(f"{where}/report/test/a.html") == "page"
    assert json.loads(load(f"{where}/data.json")) == about
    assert json.loads(load(f"{where}/profile.json"))["splits"]["train"]["rows"] == 4800
    assert json.loads(load(f"{where}/environment.json"))["packages"]["torch"]
    known = json.loads((run.out / "run.json").read_text())
    assert known == {
        "run_id": run.run_id,
        "local_id": run.local_id,
        "experiment": "tracked",
        "tracking_uri": store,
    }


def test_a_resumed_run_goes_on_and_records_no_step_twice(store: str, about: dict[str, Any], tmp_path: Path) -> None:
    first = a_run(store, about, tmp_path / "out")
    first.series("train_loss", 1, [0.75, 0.5])
    with pytest.raises(Stopped), first:
        raise Stopped("by a signal")
    assert mlflow.MlflowClient().get_run(first.run_id).info.status == "KILLED"
    with a_run(store, about, tmp_path / "out", resume=True) as second:
        assert mlflow.MlflowClient().get_run(first.run_id).info.status == "RUNNING"
        second.series("train_loss", 2, [0.5, 0.25])  # from a checkpoint after step 1
        second.metrics(2, {"train_loss": 0.5})
    assert second.run_id == first.run_id
    assert history(second.run_id, "train_loss") == [(1, 0.75), (2, 0.5), (3, 0.25)]
    assert mlflow.MlflowClient().get_run(first.run_id).info.status == "FINISHED"
    assert len(runs_of(first.local_id)) == 1
    with pytest.raises(ZeroDivisionError), a_run(store, about, tmp_path / "out", resume=True):
        raise ZeroDivisionError
    assert mlflow.MlflowClient().get_run(first.run_id).info.status == "FAILED"


def test_what_is_sent_twice_is_there_once(store: str, about: dict[str, Any], tmp_path: Path) -> None:
    """A process that is killed between sending and remembering it leaves the next one to send it again."""
    with a_run(store, about, tmp_path / "out") as run:
        run.series("train_loss", 1, [1 / step for step in range(1, 2001)])
    before = history(run.run_id, "train_loss")
    assert len(before) == 2000
    (tmp_path / "out" / "tracking" / "sent.json").unlink()
    with a_run(store, about, tmp_path / "out", resume=True):
        pass
    assert history(run.run_id, "train_loss") == before


def test_what_a_closing_run_leaves_is_sent_by_the_next(store: str, about: dict[str, Any], tmp_path: Path) -> None:
    heard = StringIO()
    with a_run(store, about, tmp_path / "out", console=Console(file=heard, width=10_000)) as run:
        assert run.wait_until_sent(20)
        run._remote.abandon()  # as when its patience ends in the middle of sending
        run.series("train_loss", 1, [0.5, 0.25])
        assert not run.wait_until_sent(1.5)
    assert "MLflow has not got" in heard.getvalue()
    assert history(run.run_id, "train_loss") == []
    with a_run(store, about, tmp_path / "out", resume=True):
        pass
    assert history(run.run_id, "train_loss") == [(1, 0.5), (2, 0.25)]
    (seen,) = mlflow.MlflowClient().get_run(run.run_id).inputs.dataset_inputs  # recorded again, there once
    assert seen.dataset.name == "clicks"


def test_a_run_that_mlflow_has_made_without_an_answer_is_found_again(
    store: str, about: dict[str, Any], tmp_path: Path
) -> None:
    with a_run(store, about, tmp_path / "out") as first:
        first.series("train_loss", 1, [0.5])
    path = tmp_path / "out" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "run_id": None}))
    with a_run(store, about, tmp_path / "out", resume=True) as second:
        second.series("train_loss", 2, [0.25])
    assert second.run_id == first.run_id
    assert history(first.run_id, "train_loss") == [(1, 0.5), (2, 0.25)]


def test_without_mlflow_everything_waits_on_disk_until_it_is_sent_elsewhere(
    store: str, about: dict[str, Any], tmp_path: Path
) -> None:
    heard = StringIO()
    away = f"http://127.0.0.1:{a_closed_port()}"
    with a_run(away, about, tmp_path / "out", console=Console(file=heard, width=10_000)) as run:
        assert run.run_id == run.local_id
        assert run.run_id.startswith("offline-")
        run.series("train_loss", 1, [0.75, 0.5])
        assert run.register(tmp_path / "bundle") is None
    lines = heard.getvalue().splitlines()
    assert len([line for line in lines if "takes no records ([Errno 111] Connection refused)" in line]) == 1
    assert any("not registered" in line and f"--out {tmp_path / 'out'} --resume" in line for line in lines)
    assert "has not got" in lines[-1]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["run_id"] is None

    with a_run(store, about, tmp_path / "out", resume=True) as later:
        pass
    assert later.local_id == run.local_id
    assert later.run_id != later.local_id
    assert history(later.run_id, "train_loss") == [(1, 0.75), (2, 0.5)]
    assert mlflow.MlflowClient().get_run(later.run_id).data.params["train.batch_size"] == "4096"
    # an evaluation knows the run by the id that the bundle was written with
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("page")
    attach_report(run.local_id, [tmp_path / "report" / "report.html"], "test")
    names = [artifact.path for artifact in mlflow.MlflowClient().list_artifacts(later.run_id, "report/test")]
    assert names == ["report/test/report.html"]


def test_a_server_that_never_answers_holds_nothing_up(
    about: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "START_PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections wait in its queue for ever
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with a_run(uri, about, tmp_path / "out") as run:
            for step in range(1, 10_001):
                run.metrics(step, {"train_loss": 1 / step})
            run.flush()
            spooled = (run.out / "tracking" / "records.jsonl").read_text()
            assert run.run_id == run.local_id, "nobody has answered, and all of this has been recorded"
        assert spooled.count('"train_loss"') == 10_000
        silent.settimeout(5)
        connection, _ = silent.accept()  # it was asked
        connection.close()


def test_what_mlflow_refuses_does_not_hold_up_the_rest(store: str, about: dict[str, Any], tmp_path: Path) -> None:
    heard = StringIO()
    with a_run(store, about, tmp_path / "out", console=Console(file=heard, width=10_000)) as run:
        run.metrics(1, {"good": 1.0, "bad?": 2.0, "better": 3.0})
        run.artifacts(tmp_path / "absent", "absent")
        run.tags({"masknet.after": "yes"})
    found = mlflow.MlflowClient().get_run(run.run_id).data
    assert (found.metrics["good"], found.metrics["better"], found.tags["masknet.after"]) == (1.0, 3.0, "yes")
    assert "bad?" not in found.metrics
    (line,) = heard.getvalue().splitlines()
    assert line.startswith("MLflow does not take metrics bad?: Invalid value")
    assert "(and 1 more)" in line


def test_a_full_disk_ends_the_recording_and_not_the_training(store: str, about: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out" / "tracking").mkdir(parents=True)
    (tmp_path / "out" / "tracking" / "records.jsonl").symlink_to("/dev/full")
    heard = StringIO()
    with a_run(store, about, tmp_path / "out", console=Console(file=heard, width=10_000)) as run:
        for step in range(3):
            run.metrics(step, {"train_loss": 1.0})
            run.flush()
    (line,) = heard.getvalue().splitlines()
    assert line.startswith("recording ends, training goes on")
    assert line.endswith("No space left on device")
    assert mlflow.MlflowClient().get_run(run.run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("code", "is_final"), [("ENOSPC", False), ("EIO", False), ("ESTALE", False), ("EACCES", False), ("ENOENT", True)]
)
def test_of_what_a_file_system_says_only_a_missing_file_is_final(code: str, is_final: bool) -> None:
    assert is_refusal(OSError(getattr(errno, code), "")) == is_final


def test_a_store_in_a_wrong_folder_is_a_mistake_and_a_full_one_is_none() -> None:
    assert is_mistake(OSError(errno.EACCES, ""))
    assert is_mistake(OSError(errno.ENOTDIR, ""))
    assert not is_mistake(OSError(errno.ENOSPC, ""))


def test_a_full_artifact_store_is_waited_for(
    store: str, about: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender_module, "FLUSH_SECONDS", 0.05)  # between two tries
    original, tries = mlflow.MlflowClient.log_text, []

    def full_twice(self: mlflow.MlflowClient, run_id: str, text: str, name: str) -> None:
        tries.append(name)
        if len(tries) <= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, run_id, text, name)

    heard = StringIO()
    with a_run(store, about, tmp_path / "out", console=Console(file=heard, width=10_000)) as run:
        assert run.wait_until_sent(20)
        monkeypatch.setattr(mlflow.MlflowClient, "log_text", full_twice)
        run.text("table_wise", "plan.txt")
        assert run.wait_until_sent(20)
    assert tries == ["plan.txt"] * 3
    found = mlflow.MlflowClient().get_run(run.run_id).info.artifact_uri
    assert mlflow.artifacts.load_text(f"{found}/plan.txt") == "table_wise"
    first, last = heard.getvalue().splitlines()
    assert first.startswith("MLflow takes no records ([Errno 28] No space left on device)")
    assert last == "MLflow is back and has every record"


def test_tries_are_seldom_again_when_nobody_waits_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_module, "FLUSH_SECONDS", 60.0)  # the pause after the first failure
    remote = MlflowRun("e", "name", "offline-1", None, may_exist=False)
    tries = []

    def away() -> None:
        tries.append(1)
        raise ConnectionRefusedError

    monkeypatch.setattr(remote, "open", away)
    sender = Sender(remote, lambda message: None)
    sender.attach(Spool(tmp_path), lambda: None)
    waiting = threading.Thread(target=sender.drained, args=(60.0,), daemon=True)
    waiting.start()
    while not sender._wake.is_set():  # it waits
        time.sleep(0.01)
    for _ in range(3):
        sender._pass()
    assert len(tries) == 3, "someone waits"
    monkeypatch.setattr(remote, "open", lambda: None)
    monkeypatch.setattr(remote, "set_status", lambda status: None)
    sender._pass()
    waiting.join()

    monkeypatch.setattr(remote, "open", away)
    assert not sender.drained(0.0)
    sender._next_try = 0.0
    for _ in range(3):
        sender._pass()
    assert len(tries) == 4, "nobody waits: one try, and none before the pause has passed"


@pytest.mark.parametrize("lost", ["set_registered_model_alias", "set_tag"])
def test_a_registration_that_is_cut_off_is_gone_on_with(
    lost: str, store: str, about: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # below which MLflow stores the files
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    schema = "name: s\nlabel: {column: click}\nfields: [{name: user, type: categorical}]\n"
    (tmp_path / "bundle" / "schema.yaml").write_text(schema)
    client, name = mlflow.MlflowClient(), f"cut-off-{lost}"
    config = at(store, tmp_path)
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"registered_model": name})})

    def away(*_: Any) -> None:
        raise ConnectionResetError

    with open_run(config, about, tmp_path / "out", resume=False, console=QUIET) as run:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mlflow.MlflowClient, lost, away)
            assert run.register(tmp_path / "bundle") is None
        (made,) = client.search_model_versions(f"name = '{name}'")
    with open_run(config, about, tmp_path / "out", resume=True, console=QUIET) as run:
        assert run.register(tmp_path / "bundle") == f"models:/{name}/{made.version}"
    assert [version.version for version in client.search_model_versions(f"name = '{name}'")] == [made.version]
    assert client.get_model_version_by_alias(name, "candidate").run_id == run.run_id
    assert client.get_run(run.run_id).data.tags["masknet.model_uri"] == f"models:/{name}/{made.version}"


@pytest.mark.long
def test_a_locked_database_is_waited_for(tmp_path: Path, about: dict[str, Any], store: str) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

    with a_run(store, about, tmp_path / "out") as run:
        run.wait_until_sent(10)
        original, calls = MlflowRun.send, []

        def locked_twice(self: MlflowRun, records: list[Any], home: Path) -> list[str]:
            calls.append(len(records))
            if len(calls) <= 2:
                raise MlflowException("(sqlite3.OperationalError) database is locked", TEMPORARILY_UNAVAILABLE)
            return original(self, records, home)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MlflowRun, "send", locked_twice)
            run.series("train_loss", 1, [0.5])
            assert run.wait_until_sent(10)
    assert len(calls) >= 3
    assert history(run.run_id, "train_loss") == [(1, 0.5)]


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("htp://localhost:5000", "unsupported URI 'htp://localhost:5000'"),
        ("http://127.0.0.1:99999", "Failed to parse"),
        ("http://mlflow.invalid:5000", "Name or service not known"),
        ("sqlite:///{path}/text", "file is not a database"),
        ("sqlite:///{path}", "unable to open database file"),
        ("postgresql://me:secret@127.0.0.1/mlflow", r"postgresql://me:\*\*\*@127.0.0.1/mlflow cannot be used"),
    ],
)
def test_a_wrong_address_is_told_before_training(uri: str, reason: str, about: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database " * 100)
    with pytest.raises(InputError, match=reason) as told:
        a_run(uri.format(path=tmp_path), about, tmp_path / "out")
    assert "secret" not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_a_run_is_not_used_for_another(store: str, about: dict[str, Any], tmp_path: Path) -> None:
    with a_run(store, about, tmp_path / "out"):
        pass
    with pytest.raises(InputError, match=r"out holds a run already: --resume goes on with it"):
        a_run(store, about, tmp_path / "out")


def test_passwords_stay_out_of_what_is_recorded(
    about: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://me:secret@127.0.0.1:{a_closed_port()}"
    monkeypatch.setattr(sys, "argv", ["/bin/masknet", "train", "--set", f"tracking.uri={uri}"])
    with a_run(uri, about, tmp_path / "out"):
        pass
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or "secret" not in path.read_text(), path
    assert "me:***@" in (tmp_path / "out" / "run.json").read_text()
    recorded = (tmp_path / "out" / "tracking" / "records.jsonl").read_text()
    assert f"masknet train --set 'tracking.uri={uri.replace('secret', '***')}'" in recorded


def test_the_git_revision_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    assert git_revision(tmp_path) == {}
    (tmp_path / "file").write_text("one")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q", "-b", "main"], ["add", "file"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    clean = git_revision(tmp_path)
    known = subprocess.run(["git", "-C", str(tmp_path), "log", "--format=%H"], check=True, capture_output=True)
    assert clean["mlflow.source.git.commit"] == known.stdout.decode().strip()
    assert (clean["mlflow.source.git.branch"], clean["masknet.git_dirty"]) == ("main", "false")
    (tmp_path / "file").write_text("two")
    assert git_revision(tmp_path)["masknet.git_dirty"] == "true"


RECORDS_FOR_EVER = """
import json, sys, time
from itertools import count
from pathlib import Path
from training.config import load_config
from training.quiet import quiet_libraries
from training.tracking.opening import open_run

quiet_libraries()
data, out = json.loads(sys.argv[1]), Path(sys.argv[2])
config = load_config(out.parent / "config.yaml", ["tracking.uri=" + sys.argv[3]])
first = int(sys.argv[4])
with open_run(config, data, out, first > 1) as run:
    for step in count(first):
        run.metrics(step, {"train_loss": 1 / step})
        if step % 50 == 0:
            run.flush()  # as after a checkpoint
            print(step, flush=True)
            time.sleep(0.05)
"""


@pytest.mark.long
def test_killed_again_and_again_a_run_has_every_step_once(store: str, about: dict[str, Any], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    at(store, tmp_path)  # writes the configuration
    checkpoint = 0
    for _ in range(3):
        words = [json.dumps(about), str(tmp_path / "out"), store, str(checkpoint + 1)]
        worker = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RECORDS_FOR_EVER, *words],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert worker.stdout is not None
        with worker.stdout:
            for _ in range(int(random.integers(1, 120))):  # up to six seconds, in which one or two batches go
                checkpoint = int(worker.stdout.readline())
        worker.kill()
        worker.wait()
    with a_run(store, about, tmp_path / "out", resume=True) as run:
        run.metrics(checkpoint + 1, {"train_loss": 1 / (checkpoint + 1)})
    found = history(run.run_id, "train_loss")
    steps = [step for step, _ in found]
    assert steps == list(range(1, len(steps) + 1))  # the last process may have got beyond its last checkpoint
    assert len(steps) > checkpoint
    assert all(value == 1 / step for step, value in found)
    assert len(runs_of(run.local_id)) == 1


@pytest.mark.long
def test_a_training_without_mlflow_is_registered_by_resuming_it(
    config: Config, store: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    client = mlflow.MlflowClient()

    def trained(uri: str, *, resume: bool) -> dict[str, Any]:
        tracking = {"uri": uri, "registered_model": "late"}
        settings = config.model_copy(update={"tracking": config.tracking.model_copy(update=tracking)})
        result = train(settings, data, tmp_path / "out", QUIET, resume=resume)
        assert result is not None
        return result

    alone = trained(f"http://127.0.0.1:{a_closed_port()}", resume=False)
    assert alone["model_uri"] is None
    assert alone["run_id"].startswith("offline-")
    weights = load_bundle(Path(alone["bundle"])).digest
    later = trained(store, resume=True)
    assert later["model_uri"] == "models:/late/1"
    assert later["metrics"] == alone["metrics"]
    assert load_bundle(Path(later["bundle"])).digest == weights, "not trained again"
    steps = [step for step, _ in history(later["run_id"], "train_loss")]
    assert steps == list(range(1, later["steps"] + 1))
    assert history(later["run_id"], "test_auc")[-1][1] == later["metrics"]["test"]["auc"]
    assert client.get_model_version_by_alias("late", "candidate").run_id == later["run_id"]
    assert trained(store, resume=True)["model_uri"] == "models:/late/1", "registered once"
    assert len(client.search_model_versions("name = 'late'")) == 1
