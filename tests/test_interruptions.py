"""Training in several processes that are killed, stopped or far apart: the model is that of an undisturbed training."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "training" / "configs" / "movielens.yaml"
# No dropout: its random numbers are drawn per process. 12 epochs of 10 steps, and a checkpoint after every fourth.
SETTINGS = [
    "model.dropout=0",
    "model.block_width=16",
    "train.batch_size=512",
    "train.epochs=12",
    "train.early_stop.patience=12",
    "train.checkpoint_steps=4",
]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # another number of threads would round differently


class Home:
    """A folder in which a model is trained, with its own MLflow."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self._data = folder, data
        self.started: list[subprocess.Popen[str]] = []
        folder.mkdir()

    def command(self, *options: str, settings: tuple[str, ...] = ()) -> list[str]:
        words = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
        return ["train", str(CONFIG), "--data", str(self._data), "--out", "out", "--json", *words, *options]

    def start(self, arguments: list[str], launcher: tuple[str, ...] = ("-m", "training")) -> subprocess.Popen[str]:
        store = {"MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/mlflow.db", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, *launcher, *arguments],
            cwd=self.folder,
            env={**os.environ, **store, **ONE_THREAD},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def train(self, *options: str, settings: tuple[str, ...] = ()) -> None:
        code, _, told = end(self.start(self.command(*options, settings=settings)))
        assert code == 0, told

    def wait_for_checkpoint(self, number: int) -> None:
        """Until so many checkpoints have been written, all in all."""
        seen: set[str] = set()
        for _ in range(6000):
            seen |= {path.name for path in (self.folder / "out" / "checkpoints").glob("step-" + 12 * "[0-9]")}
            if len(seen) >= number:
                return
            time.sleep(0.01)
        pytest.fail("no checkpoint after a minute")

    def weights(self) -> dict[str, np.ndarray]:
        files = sorted((self.folder / "out" / "bundle").rglob("*.safetensors"))
        return {f"{file.stem} {name}": array for file in files for name, array in load_file(file).items()}

    def losses(self) -> dict[int, float]:
        """The training loss by step, of the one run there is."""
        client = mlflow.MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        (run,) = client.search_runs(["1"])
        assert run.info.status == "FINISHED"
        return {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "train_loss")}


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    printed, told = process.communicate(timeout=180)
    return process.returncode, printed, told


@pytest.fixture
def home(data: Path, tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "home", data)
    yield home
    for process in home.started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """What two processes train when nothing happens to them."""
    home = Home(tmp_path_factory.mktemp("undisturbed") / "home", data)
    home.train("--nproc", "2")
    assert sorted(home.losses()) == list(range(1, 121))
    return home


def worker(launcher: subprocess.Popen[str], rank: int) -> int:
    """Process id of one of the processes that a command has started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for child in map(int, children):
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return child
    raise AssertionError(f"no process of rank {rank}")


def require_same(home: Home, undisturbed: Home) -> None:
    expected, found = undisturbed.weights(), home.weights()
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert home.losses() == undisturbed.losses()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_started_again(home: Home, undisturbed: Home, rank: int) -> None:
    launcher = home.start(home.command("--nproc", "2", "--max-restarts", "1"))
    home.wait_for_checkpoint(5)
    os.kill(worker(launcher, rank), signal.SIGKILL)
    code, printed, told = end(launcher)
    assert code == 0, told
    assert json.loads(printed)["steps"] == 120
    assert "going on after step" in told
    require_same(home, undisturbed)


def test_a_stopped_training_goes_on(home: Home, undisturbed: Home) -> None:
    launcher = home.start(home.command("--nproc", "2"))
    home.wait_for_checkpoint(5)
    launcher.terminate()
    code, printed, told = end(launcher)
    assert (code, printed) == (75, ""), told
    assert told.count("--resume") == 1
    refused = end(home.start(home.command("--nproc", "2")))
    assert refused[0] == 2
    assert refused[2].splitlines()[-1].startswith("masknet: out/checkpoints exists already; go on with --resume")
    home.train("--nproc", "2", "--resume")
    require_same(home, undisturbed)


def test_two_machines_train_one_model(home: Home, data: Path, tmp_path: Path) -> None:
    settings = ("train.epochs=2", "optimizer.sparse={name: sgd, lr: 0.05}")
    alone = Home(tmp_path / "alone", data)
    alone.train(settings=settings)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{probe.getsockname()[1]}", "--rdzv-id", "nightly"]
    torchrun = ("-m", "torch.distributed.run", *where, "--rdzv-backend", "c10d", "-m", "training")
    machines = [
        home.start(home.command(*where, settings=settings)),
        home.start(home.command(settings=settings), torchrun),
    ]
    ended = [end(machine) for machine in machines]
    assert [code for code, _, _ in ended] == [0, 0], ended
    (printed,) = [printed for _, printed, _ in ended if printed]
    assert json.loads(printed)["steps"] == 20
    one, two = alone.losses(), home.losses()
    assert list(two) == list(one) == list(range(1, 21))
    # sums over a batch are taken in another order, which fp32 rounds differently, by 1e-7 a step
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=2e-5)
    for name, array in alone.weights().items():
        np.testing.assert_allclose(home.weights()[name], array, rtol=0, atol=1e-4, err_msg=name)
