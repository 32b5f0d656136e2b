"""Sharded training: two processes with the same global batches do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from serving.bundle import load_bundle

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "training" / "configs" / "movielens.yaml"
# No dropout: its random numbers are drawn per process. The last batch of 4,800 rows has 192.
SETTINGS = ["model.dropout=0", "model.block_width=16", "train.epochs=2", "train.batch_size=512"]


def train(home: Path, data: Path, processes: int, *settings: str) -> dict[str, Any]:
    words = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    command = [sys.executable, "-m", "training", "train", str(CONFIG), "--data", str(data), "--out", "out", *words]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db", "PYTHONPATH": str(ROOT)}
    home.mkdir()
    answer = subprocess.run(
        [*command, "--nproc", str(processes), "--json"],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    result: dict[str, Any] = json.loads(answer.stdout)
    return result


def losses(home: Path, run_id: str) -> np.ndarray:
    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")
    assert len(client.search_runs(["1"])) == 1, "one run, not one per process"
    history = client.get_metric_history(run_id, "train_loss")
    return np.array([metric.value for metric in sorted(history, key=lambda metric: metric.step)])


# Not adagrad, whose first step moves every weight by the whole learning rate in the direction of its gradient's sign:
# where a gradient is nearly zero, rounding decides the sign, and the curves part after a dozen equal steps.
# Row-wise Adagrad has the same trouble at larger learning rates: at .05 the curves part after sixteen steps.
# With sgd the norms are by statistics over rows, which have to be those of both processes, in the middle of TorchRec's
# own exchanges: 20 steps in their warm-up and after it.
@pytest.mark.parametrize(
    ("optimizer", "lr", "norms"),
    [
        pytest.param(
            "sgd",
            0.05,
            [
                "model.embedding_norm={name: power, warmup_steps: 8}",
                "model.hidden_norm={name: unified, warmup_steps: 8}",
                "train.average.name=ema",
            ],
            marks=pytest.mark.long,
        ),
        pytest.param("rowwise_adagrad", 0.02, [], marks=pytest.mark.long),
    ],
)
def test_loss_curve_and_model_are_those_of_one_process(
    data: Path, tmp_path: Path, optimizer: str, lr: float, norms: list[str]
) -> None:
    sparse = f"optimizer.sparse={{name: {optimizer}, lr: {lr}}}"
    results = {n: train(tmp_path / str(n), data, n, sparse, *norms) for n in (1, 2)}
    one, two = (losses(tmp_path / str(n), results[n]["run_id"]) for n in (1, 2))
    assert len(one) == len(two) == results[1]["steps"] == 20
    # Sums over a batch are taken in another order, which fp32 rounds differently, by 1e-7 a step; Adam may make
    # it more. A wrong scale of the gradients or a wrong order of the fields is off by 1e-2 and more.
    np.testing.assert_allclose(two, one, rtol=2e-5)
    rows = json.loads((tmp_path / "1" / "out" / "bundle" / "golden.json").read_text())["rows"]
    scores = [load_bundle(tmp_path / str(n) / "out" / "bundle").scorer.score(rows) for n in (1, 2)]
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=1e-4)
