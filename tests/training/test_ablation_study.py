"""`masknet ablate` as its users meet it: real trainings in worker processes, a restart, bad cells, what is written."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from rich.console import Console

from features.dataset import LABEL, PreparedDataset, groups_of
from features.errors import InputError
from features.metrics import score_metrics
from training.ablation import jobs as jobs_module
from training.ablation.cells import Grid
from training.ablation.command import AblateOptions, run_ablate
from training.ablation.document import update_document
from training.ablation.jobs import Job, run_job, run_jobs
from training.config import Config
from training.workers import DONE, FAILED

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "training" / "configs" / "movielens.yaml"
SMALL = ["model.block_width=16", "model.head=[8]", "model.embedding_dim=8", "train.epochs=2", "train.batch_size=512"]
QUIET = Console(quiet=True)
BAD = "optimizer.dense.lr=1e30"  # a cell that cannot be trained is a row and not the end


def options(data: Path, out: Path, **changes: Any) -> AblateOptions:
    grid = Grid(norms=("layer", "power"), without=("mask",), vary=(BAD,))
    given: dict[str, Any] = {"grid": grid, "set": SMALL, "seeds": 2, "tune_lr": 1, "jobs": 2, "name": "small"}
    return AblateOptions(config=CONFIG, data=data, out=out, **{**given, **changes})


@pytest.fixture(scope="module")
def out(config: Config, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study; `config` sets where MLflow is."""
    home = tmp_path_factory.mktemp("ablation")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        run_ablate(options(data, home / "out", landscape=("power",), document=home / "ABLATION.md"), QUIET)
    return home / "out"


@pytest.fixture(scope="module")
def found(out: Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((out / "cells.json").read_text())
    return answer


def cell_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    cell: dict[str, Any] = next(cell for cell in found["cells"] if cell["cell"] == name)
    return cell


def test_metrics_are_the_scorers_on_the_test_split(out: Path, found: dict[str, Any], dataset: PreparedDataset) -> None:
    test = dataset.split("test")
    [scores] = (out / "runs" / "power").glob("seed-1-*.npy")
    expected = score_metrics(test[LABEL].to_numpy(), np.load(scores), groups_of(test))
    for name in ("auc", "logloss", "ne", "ece"):
        assert cell_of(found, "power")["metrics"][name]["by_seed"]["1"] == pytest.approx(expected[name], abs=1e-10)
    assert expected["auc"] is not None
    assert expected["auc"] > 0.5


def test_a_cell_that_goes_wrong_is_a_row_that_says_so(found: dict[str, Any]) -> None:
    diverged = cell_of(found, BAD)
    assert diverged["trouble"].startswith("diverged in 2 of 2 seeds: the loss is")
    assert diverged["seeds_done"] == []
    assert diverged["metrics"] == diverged["differences"] == dict.fromkeys(found["metrics"])
    good = cell_of(found, "power")
    assert (good["trouble"], good["seeds_done"]) == (None, [1, 2])


def test_what_is_written(out: Path, found: dict[str, Any]) -> None:
    with (out / "cells.csv").open() as file:
        rows = {row["cell"]: row for row in csv.DictReader(file)}
    assert list(rows) == [cell["cell"] for cell in found["cells"]]
    power = cell_of(found, "power")
    assert float(rows["power"]["auc"]) == power["metrics"]["auc"]["mean"]
    assert float(rows["power"]["logloss_difference"]) == power["differences"]["logloss"]["mean"]
    rates = json.loads((out / "rates.json").read_text())
    assert rates["power"] == 3e-4
    assert "power" in (out / "report.html").read_text()
    document = (out.parent / "ABLATION.md").read_text()
    assert f"{power['metrics']['auc']['mean']:.4f}" in document
    assert "diverged in 2 of 2 seeds" in document
    assert power["landscape"]["curvature"]["parameters"] == power["parameters"]
    assert cell_of(found, "layer")["landscape"] is None
    assert len(power["blocks"]) == 3
    assert power["step"]["ratio"]["p50"] > 0


def test_mlflow_has_a_run_for_the_study_and_one_below_for_every_seed(out: Path, found: dict[str, Any]) -> None:
    client = mlflow.MlflowClient()
    parent = client.get_run(json.loads((out / "study.json").read_text())["run_id"])
    assert parent.info.status == "FINISHED"
    assert {artifact.path for artifact in client.list_artifacts(parent.info.run_id)} >= {"cells.json", "report.html"}
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert len(children) == 4 * 2
    for child in children:
        name = child.data.tags["masknet.cell"]
        seed = child.data.params["train.seed"]
        if name == "power":
            expected = cell_of(found, "power")["metrics"]["logloss"]["by_seed"][seed]
            assert child.data.metrics["test_logloss"] == pytest.approx(expected, abs=1e-10)
            assert child.data.params["model.hidden_norm.name"] == "power"
        if name.startswith("optimizer"):
            assert child.info.status == "FAILED"
            assert "the loss is" in child.data.tags["masknet.reason"]


@pytest.mark.long
def test_a_restart_runs_only_what_is_missing(
    out: Path, found: dict[str, Any], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)
    files = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*.json")}
    [missing] = (out / "runs" / "layer").glob("seed-2-*.json")
    before = np.load(missing.with_suffix(".npy"))
    missing.unlink()
    again, _ = run_ablate(options(data, out, landscape=("power",)), QUIET)
    run_again = {path for path, written in files.items() if path.stat().st_mtime_ns != written}
    assert run_again == {missing}, "a loss that became NaN would do so again"
    # the same seed on the same number of threads: the same bits
    assert np.array_equal(np.load(missing.with_suffix(".npy")), before)
    logloss = cell_of(again, "layer")["metrics"]["logloss"]["by_seed"]
    assert {str(seed): value for seed, value in logloss.items()} == pytest.approx(
        cell_of(found, "layer")["metrics"]["logloss"]["by_seed"],
        rel=1e-12,  # threads may add up in another order
    )
    client = mlflow.MlflowClient()
    run_id = json.loads((out / "study.json").read_text())["run_id"]
    experiment = client.get_run(run_id).info.experiment_id
    assert len(client.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'")) == 4 * 2


def test_another_question_does_not_find_this_ones_answers(
    out: Path, data: Path, planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)
    with pytest.raises(InputError, match="holds an ablation on other data"):
        run_ablate(options(planted, out, grid=Grid(norms=("layer",))), QUIET)


@pytest.fixture(scope="module")
def planted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data set, but for one file's digest."""
    other = tmp_path_factory.mktemp("other") / "data"
    other.mkdir()
    for path in data.iterdir():
        if path.name != "manifest.json":
            (other / path.name).symlink_to(path)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["files"]["train/part-00000.parquet"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    return other


@pytest.mark.long
def test_a_process_that_dies_is_a_failed_cell_and_the_others_go_on(
    config: Config, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory runs out: the first worker is killed by a signal, which no handler in it sees."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, threading, time\n"
        "def watch():\n"
        f"    flag = {str(tmp_path / 'started')!r}\n"
        "    while not os.path.exists(flag): time.sleep(.02)\n"
        "    os.unlink(flag)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    jobs = [Job(cell=f"c{i}", config=config, data=data, result=tmp_path / f"{i}.json") for i in range(2)]
    results: dict[str, str] = {}

    def done(job: Job, result: dict[str, Any]) -> None:
        results[job.cell] = result["status"]

    (tmp_path / "started").touch()
    run_jobs(jobs, 1, done)
    assert results == {"c0": FAILED, "c1": DONE}
    assert json.loads((tmp_path / "0.json").read_text())["reason"] == "its process died"
    assert jobs[0].finished() is None, "a restart tries it again"
    assert jobs[1].finished() is not None


@pytest.mark.long
def test_the_search_takes_the_rate_of_the_best_validation_loss(
    config: Config, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    only = {"grid": Grid(norms=("layer",)), "seeds": 1, "jobs": 1, "set": [*SMALL, "train.epochs=1"]}
    found, out = run_ablate(options(data, tmp_path / "out", tune_lr=3, **only), QUIET)
    cell = cell_of(found, "layer")
    tried = {float(rate): loss for rate, loss in cell["tried"].items()}
    assert cell["lr"] == min(tried, key=lambda rate: tried[rate])
    expected = [1e-4, 3e-4, 9e-4]
    for below, above in [(3.33e-5, 2.7e-3), (1.11e-5, 8.1e-3)]:  # two more at most, while the best is at an end
        best = min(expected, key=lambda rate: tried[rate])
        expected += [below] if best == min(expected) else [above] if best == max(expected) else []
    assert sorted(tried) == sorted(expected)
    for path in (out / "runs" / "layer").glob("rate-*.json"):
        result = json.loads(path.read_text())
        assert (result["seed"], result["valid_logloss"]) == (0, tried[result["lr"]])
    # the stored rates take the place of the search
    given, _ = run_ablate(options(data, tmp_path / "given", rates=out / "rates.json", **only), QUIET)
    assert cell_of(given, "layer")["lr"] == cell["lr"]
    assert cell_of(given, "layer")["metrics"] == cell["metrics"]
    with pytest.raises(InputError, match="--rates has no learning rate for the cell rms"):
        run_ablate(options(data, tmp_path / "no", rates=out / "rates.json", grid=Grid(norms=("layer", "rms"))), QUIET)


@pytest.mark.long
def test_the_command_line(config: Config, data: Path, tmp_path: Path) -> None:
    words = ["ablate", str(CONFIG), "--data", str(data), "--norms", "layer,batchnorm", "--json"]
    answer = subprocess.run(
        [sys.executable, "-m", "training", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert "cell batchnorm: model.embedding_norm.name: 'batchnorm' is no normalization" in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_document_keeps_other_studies_and_the_commentary(found: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "ABLATION.md"
    update_document(path, found)
    begin = "<!-- commentary -->\n"
    path.write_text(path.read_text().replace(begin, begin + "Written by hand.\n"))
    update_document(path, {**found, "study": "other"})
    update_document(path, {**found, "training_seconds": 7200.0})
    text = path.read_text()
    assert text.count("Written by hand.") == 1
    assert re.findall("^## (.*)$", text, re.M) == ["What the numbers do and do not say", "small", "other"]
    small, other = text.split("## small")[1].split("## other")
    assert "; 120 minutes of training in all" in small
    assert "; 120 minutes" not in other


def test_what_goes_wrong_in_a_run_is_a_result_that_is_tried_again(
    config: Config, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(cell="c", config=config, data=data, result=tmp_path / "c.json")

    def fail(job: Job) -> dict[str, Any]:
        raise MemoryError("no room\nfor it")

    monkeypatch.setattr(jobs_module, "_train_and_measure", fail)
    failed = run_job(job)
    assert (failed["status"], failed["reason"]) == (FAILED, "MemoryError: no room for it")
    assert json.loads(job.result.read_text()) == failed
    assert job.finished() is None
    # numbers that JSON does not know become null; a result that came to an end is not replaced by a failure
    odd = {"status": DONE, "valid_logloss": 0.5, "diagnostics": [{"dead": float("nan"), "angle": [float("inf"), 1.0]}]}
    monkeypatch.setattr(jobs_module, "_train_and_measure", lambda job: odd)
    assert run_job(job)["diagnostics"] == [{"dead": None, "angle": [None, 1.0]}]
    monkeypatch.setattr(jobs_module, "_train_and_measure", fail)
    assert run_job(job)["status"] == DONE
    assert job.finished() is not None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"grid": Grid(norms=("layer",), vary=("model.reduction_ratio=0.0001",))},
            "cell model.reduction_ratio=0.0001: ",
        ),
        ({"grid": Grid(norms=("layer", "evonorm_s0(groups=7)"))}, "groups 7 does not divide a width of 8"),
        ({"landscape": ("rms",)}, "--landscape rms is no cell; there are layer, power"),
        ({"name": "x --> y"}, "--name 'x --> y' may have letters"),
        ({"rates": "[1]"}, "must be a JSON object of positive learning rates"),
        ({"rates": '{"layer": "abc"}'}, "must be a JSON object of positive learning rates"),
        ({"rates": '{"layer": -1}'}, "must be a JSON object of positive learning rates"),
        ({"out": "file"}, "cannot be made"),
        ({"document": "folder"}, "is a folder"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_is_told_before_anything_is_trained(
    config: Config, data: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    if "rates" in changes:
        (tmp_path / "rates.json").write_text(changes["rates"])
        changes = {"rates": tmp_path / "rates.json"}
    given = {key: tmp_path / value if key in ("out", "document") else value for key, value in changes.items()}
    with pytest.raises(InputError) as error:
        run_ablate(options(data, **{"out": tmp_path / "out", **given}), QUIET)
    assert told in str(error.value)
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.long
def test_ctrl_c_ends_all_processes_and_the_same_command_goes_on(config: Config, data: Path, tmp_path: Path) -> None:
    words = [
        word for setting in (*SMALL, "train.epochs=50", "train.early_stop.patience=50") for word in ("--set", setting)
    ]
    command = ["ablate", str(CONFIG), "--data", str(data), "--norms", "layer", "--seeds", "2", "--tune-lr", "1", *words]
    process = subprocess.Popen(
        [sys.executable, "-m", "training", *command, "--jobs", "2", "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell's background job, as these tests may be one, has its children ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any(line.startswith("seeds: 2") for line in lines)
    time.sleep(6)  # the workers have started, or are about to
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    told = process.communicate(timeout=30)[1]
    assert process.returncode == 75, told
    assert told.strip().splitlines() == ["masknet: stopped; the same command goes on with what is done"]
    assert not list((tmp_path / "out").rglob("*.partial-*"))
    for _ in range(100):  # multiprocessing's own helper notices a moment later
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("processes are left")
