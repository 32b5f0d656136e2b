"""Members of an ensemble: each is what training it alone gives, also after a stop; the bundle serves their mean."""

from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from rich.console import Console

from features.dataset import PreparedDataset
from features.errors import InputError
from serving.bundle import Bundle, load_bundle
from training.config import Config, load_config
from training.distributed import join_world
from training.errors import Stopped
from training.fit.dataset import FitResult, Going, fit_dataset
from training.fit.members import fit_members, require_members_possible
from training.fit.starting import Start
from training.progress import Silent
from training.train import train

CONFIG = Path(__file__).parents[2] / "training" / "configs" / "movielens.yaml"
SMALL = ["model.block_width=8", "model.head=[4]", "model.embedding_dim=4", "model.blocks=1", "train.batch_size=1024"]
STEPS = 5  # of an epoch: 4,800 rows


def small(*overrides: str) -> Config:
    return load_config(CONFIG, [*SMALL, "train.epochs=2", "train.seed=3", "train.checkpoint_steps=2", *overrides])


class Listener(Silent):
    """Asks to stop after so many steps in all, over all members."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.steps, self.members = 0, list[tuple[int, int]]()
        self._stop_after = stop_after

    def member_started(self, number: int, of: int) -> None:
        self.members.append((number, of))

    def steps_done(
        self, step: int, losses: list[float], auc: float | None, samples_per_second: float, **numbers: float
    ) -> None:
        self.steps += len(losses)

    def asked(self) -> bool:
        return self._stop_after is not None and self.steps >= self._stop_after


def going(folder: Path, listener: Listener, *, resume: bool = False) -> Going:
    return Going(checkpoints=folder, failed=folder, observer=listener, resume=resume, stop_asked=listener.asked)


def same_bits(left: FitResult, right: FitResult) -> None:
    assert left.weights is not None
    assert right.weights is not None
    for mine, other in [(left.weights.network, right.weights.network), (left.weights.tables, right.weights.tables)]:
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert left.position.history == right.position.history


@pytest.mark.long
def test_each_member_is_what_its_seed_alone_gives_also_after_a_stop(dataset: PreparedDataset, tmp_path: Path) -> None:
    with join_world() as world:
        alone = [
            fit_dataset(small(f"train.seed={seed}"), dataset, world, going(tmp_path / f"{seed}", Listener()))
            for seed in (3, 4)
        ]
        listener = Listener(stop_after=2 * STEPS + 1)  # in the second member
        with pytest.raises(Stopped) as stopped:
            fit_members(small("train.members=2"), dataset, world, going(tmp_path / "both", listener))
        assert listener.members == [(0, 2), (1, 2)]
        done = int(str(stopped.value).rpartition(" ")[2])
        assert 0 < done < 2 * STEPS
        again = Listener()
        both = fit_members(small("train.members=2"), dataset, world, going(tmp_path / "both", again, resume=True))
    assert again.steps == 2 * STEPS - done  # nothing of the first member is trained again
    for mine, other in zip(both, alone, strict=True):
        same_bits(mine, other)
    assert both[0].weights is not None
    assert both[1].weights is not None
    assert not torch.equal(both[0].weights.tables["user_id"], both[1].weights.tables["user_id"])


def test_the_bundle_serves_the_mean_and_the_run_tells_members_apart(
    config: Config, dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = small("train.members=2", "calibration.method=platt", "tracking.registered_model=members")
    result = train(given, dataset.path, tmp_path / "out", Console(quiet=True))
    assert result is not None
    bundle, table = load_bundle(tmp_path / "out" / "bundle"), dataset.split("test")
    logit_MN = _logits(bundle, dataset)
    assert len(logit_MN) == 2
    mean_N = (1 / (1 + np.exp(-logit_MN))).mean(0)
    assert np.abs(bundle.scorer.uncalibrated(table) - mean_N).max() < 1e-6
    assert bundle.scorer.calibration.kind == "platt"  # fitted on the mean, once
    assert [member["epochs"] for member in result["members"]] == [2, 2]
    assert result["steps"] == 4 * STEPS
    client = mlflow.MlflowClient()
    first, second = (
        [metric.value for metric in client.get_metric_history(result["run_id"], name)]
        for name in ("train_loss", "member_01/train_loss")
    )
    assert len(first) == len(second) == 2 * STEPS
    assert first != second


def _logits(bundle: Bundle, dataset: PreparedDataset) -> np.ndarray:
    """Of each member, in float64 from its own forward pass on the test rows."""
    from features.batches import EncodedRows

    rows = EncodedRows.of(dataset.pipeline.as_served(dataset.split("test")), dataset.pipeline.layout)
    batch = rows.gather(np.arange(rows.num_rows))
    with torch.no_grad():
        return np.stack([model(*batch).double().numpy() for model in bundle.scorer.models])


def test_what_cannot_have_members_is_refused(bundle: Bundle, dataset: PreparedDataset) -> None:
    given = small("train.members=2")
    require_members_possible(given, dataset, None)
    with pytest.raises(InputError, match=r"train\.members 2: training goes on from one model"):
        require_members_possible(given, dataset, Start(bundle))
    day = replace(dataset, manifest={**dataset.manifest, "files": {"train/part.parquet": ""}})
    with pytest.raises(InputError, match=r"train\.members 2 needs a data set with a validation split"):
        require_members_possible(given, day, None)
