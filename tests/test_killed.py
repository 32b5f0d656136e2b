"""Real processes that are killed, and go on: nothing is lost, and the end is the same, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from training.fit.checkpoints import plain_tensors, read_whole

ROOT = Path(__file__).parent.parent
KILLS = 20
SHAPE = ["model.embedding_dim=8", "model.blocks=2", "model.block_width=16", "model.head=[8]", "model.dropout=0.2"]
SMALL = [*SHAPE, "train.average.name=ema"]
LONG = ["train.batch_size=256", "train.epochs=30", "train.early_stop.patience=30", "train.checkpoint_steps=7"]

pytestmark = pytest.mark.long


def command(data: Path, out: Path, *words: str) -> list[str]:
    keys = [word for key in [*SMALL, *LONG] for word in ("--set", key)]
    config = ROOT / "training" / "configs" / "movielens.yaml"
    return [
        sys.executable,
        "-m",
        "training",
        "train",
        str(config),
        "--data",
        str(data),
        "--out",
        str(out),
        *keys,
        *words,
    ]


def start(home: Path, data: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db",
    }
    with (home / "log.txt").open("a") as log:
        return subprocess.Popen(
            command(data, out, *words), cwd=home, env=environment, stdout=log, stderr=log, text=True
        )


def finish(process: subprocess.Popen[str], home: Path) -> int:
    code = process.wait(timeout=300)
    assert code in (0, 75), (home / "log.txt").read_text()
    return code


def weights(out: Path) -> dict[str, bytes]:
    members = out / "bundle" / "members"
    return {
        f"{path.relative_to(members)}/{name}": value.tobytes()
        for path in sorted(members.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def wait_for_steps(process: subprocess.Popen[str], out: Path, before: set[str]) -> None:
    """Until a checkpoint is there that was not, or the process has ended."""
    while process.poll() is None and {path.name for path in (out / "checkpoints").glob("step-*")} <= before:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nobody stopped."""
    home = tmp_path_factory.mktemp("whole")
    assert finish(start(home, data, home / "out"), home) == 0
    return home / "out"


def test_a_training_killed_at_twenty_points_ends_bit_for_bit_the_same(data: Path, tmp_path: Path, whole: Path) -> None:
    out, points = tmp_path / "out", random.Random(1)
    steps_at_kill = []
    for kill in range(KILLS):
        process = start(tmp_path, data, out, *(["--resume"] if out.exists() else []))
        before = {path.name for path in (out / "checkpoints").glob("*-*")}
        if kill % 5:  # every fifth anywhere, also while it starts
            wait_for_steps(process, out, before)
        time.sleep(points.uniform(0, 0.3 if kill % 5 else 6))
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL, "it ended before it could be killed twenty times"
        steps_at_kill.append(max((path.name for path in (out / "checkpoints").glob("step-*")), default=""))
    assert len(set(steps_at_kill)) > KILLS / 2  # it did get on in between
    assert finish(start(tmp_path, data, out, "--resume"), tmp_path) == 0
    assert weights(out) == weights(whole)
    told, expected = (json.loads((path / "result.json").read_text()) for path in (out, whole))
    for split, metrics in expected["metrics"].items():  # the order of a sum over groups is not fixed
        assert told["metrics"][split] == pytest.approx(metrics, rel=1e-12)
    assert told["steps"] == expected["steps"]
    assert not list((out / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(
    data: Path, tmp_path: Path, whole: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = start(tmp_path, data, out)
    wait_for_steps(process, out, set())
    process.send_signal(number)
    assert finish(process, tmp_path) == 75
    assert f"--out {out} --resume" in (tmp_path / "log.txt").read_text()
    assert not (out / "bundle").exists()
    assert finish(start(tmp_path, data, out, "--resume"), tmp_path) == 0
    assert weights(out) == weights(whole)


@pytest.mark.parametrize("count", [1, 4])
def test_two_processes_checkpoint_is_gone_on_with_by_another_number(data: Path, tmp_path: Path, count: int) -> None:
    steady = ["--set", "model.dropout=0", "--set", "train.epochs=4"]  # dropout draws by process
    assert finish(start(tmp_path, data, tmp_path / "whole", *steady), tmp_path) == 0
    process = start(tmp_path, data, tmp_path / "out", "--nproc", "2", *steady)
    wait_for_steps(process, tmp_path / "out", set())
    process.send_signal(signal.SIGTERM)
    assert finish(process, tmp_path) == 75
    assert finish(start(tmp_path, data, tmp_path / "out", "--nproc", str(count), "--resume", *steady), tmp_path) == 0
    told, expected = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("out", "whole"))
    # sums over rows in another order: relative differences of 1e-7 a step, some dozens of steps
    assert told["metrics"]["test"]["logloss"] == pytest.approx(expected["metrics"]["test"]["logloss"], rel=1e-5)
    assert told["steps"] == expected["steps"]


def test_processes_draw_dropout_apart_whatever_the_plan(data: Path, tmp_path: Path) -> None:
    words = [word for key in ("sharding.type=data_parallel", "train.epochs=1") for word in ("--set", key)]
    assert finish(start(tmp_path, data, tmp_path / "out", "--nproc", "2", *words), tmp_path) == 0
    newest = max((tmp_path / "out" / "checkpoints").glob("step-*"))
    random = plain_tensors(newest, "random")
    read_whole(newest, {"random": random})
    assert len(random["states"]) == 2
    assert not torch.equal(*random["states"])


def test_two_processes_with_running_statistics_end_together_when_the_loss_explodes(data: Path, tmp_path: Path) -> None:
    exploding = ["optimizer.dense={name: sgd, lr: 1.0e+18}", "model.hidden_norm=power", "train.gradient_clip=null"]
    words = [word for key in exploding for word in ("--set", key)]
    process = start(tmp_path, data, tmp_path / "out", "--nproc", "2", *words)
    assert process.wait(timeout=120) == 1
    log = (tmp_path / "log.txt").read_text()
    assert log.count("masknet: the loss is") == 1
    assert "at step" in log
    assert list((tmp_path / "out" / "failed").glob("step-*-rank-*/batch.safetensors"))


def test_what_cannot_be_gone_on_with(data: Path, tmp_path: Path) -> None:
    def answer(*words: str) -> tuple[int, str]:
        made = subprocess.run(
            [sys.executable, "-m", "training", "train", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return made.returncode, made.stderr

    config = str(ROOT / "training" / "configs" / "movielens.yaml")
    code, said = answer(config, "--data", str(data), "--resume")
    assert code == 2
    assert "--resume goes on with what is in a folder: give it with --out" in said
