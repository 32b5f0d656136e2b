"""A loss out of bounds: which step, which batch, where in the network; or skipped without a trace."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from features.batches import Batch
from features.dataset import PreparedDataset
from features.errors import InputError
from masknet.config import MaskNetConfig
from masknet.model import MaskNet, Table, initial_rows
from serving.bundle import tables_of
from training.config import Config, load_config
from training.distributed import join_world
from training.errors import Failure
from training.fit import epochs
from training.fit.dataset import FitResult, Going, fit_dataset
from training.fit.guard import first_broken
from training.fit.starting import build_model
from training.fit.task import ClickTask, StepOutput
from training.progress import Silent

CONFIG = Path(__file__).parents[2] / "training" / "configs" / "movielens.yaml"
SMALL = ["model.block_width=16", "model.head=[8]", "model.embedding_dim=8", "model.blocks=2", "train.epochs=1"]


def small(*overrides: str) -> Config:
    return load_config(CONFIG, [*SMALL, *overrides])


def run(config: Config, dataset: PreparedDataset, folder: Path) -> FitResult:
    with join_world() as world:
        return fit_dataset(
            config,
            dataset,
            world,
            Going(checkpoints=folder / "checkpoints", failed=folder / "failed", observer=Silent()),
        )


def poison(patch: pytest.MonkeyPatch, factor: float, *calls: int) -> None:
    """Multiply the training loss of the given steps, counted from 1."""
    honest, seen = ClickTask.forward, []

    def forward(task: ClickTask, batch: Batch) -> tuple[torch.Tensor, StepOutput]:
        loss, output = honest(task, batch)
        counts = task.training and isinstance(batch, Batch)  # not when the pipeline traces the module
        if counts:
            seen.append(batch)
        spoiled = counts and len(seen) in calls
        return (loss * factor, output._replace(loss=output.loss * factor)) if spoiled else (loss, output)

    patch.setattr(ClickTask, "forward", forward)


def test_a_large_penalty_is_no_broken_loss(dataset: PreparedDataset, tmp_path: Path) -> None:
    """Rows of deviation 1 cost far more than train.max_loss at the start, and the rows' own loss is what is bounded."""
    settings = [
        "model.embedding_init=1.0",
        "optimizer.embedding_prior=1000",
        "train.max_loss=5",
        "train.batch_size=2400",
    ]
    fitted = run(small(*settings, "optimizer.embedding_l2=10"), dataset, tmp_path)
    assert fitted.position.step == 2
    assert not (tmp_path / "failed").exists()


def test_a_rate_that_is_too_large_ends_with_step_place_and_batch(dataset: PreparedDataset, tmp_path: Path) -> None:
    config = small(
        "train.batch_size=512", "optimizer.dense.lr=1e18", "train.gradient_clip=null", "optimizer.dense.name=sgd"
    )
    with pytest.raises(Failure, match=r"the loss is .* at step [2-9]: .*; its batch is in") as told:
        run(config, dataset, tmp_path)
    folder = next((tmp_path / "failed").iterdir())
    assert str(folder) in str(told.value)
    report = json.loads((folder / "report.json").read_text())
    assert f"step {report['step']}:" in str(told.value)
    assert report["place"] in str(told.value)
    batch = load_file(folder / "batch.safetensors")
    assert len(batch["label"]) == 512
    assert int(batch["lengths"].sum()) == len(batch["ids"])
    assert report["fields_with_ids"] == list(dataset.pipeline.layout.ids)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e6])
def test_a_loss_out_of_bounds_ends_training_before_its_update(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    poison(monkeypatch, factor, 3)
    with pytest.raises(Failure, match="at step 3: all values are finite"):
        run(small("train.batch_size=512"), dataset, tmp_path)


@pytest.mark.parametrize("average", ["none", "ema"])
def test_a_skipped_batch_leaves_no_trace(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, average: str
) -> None:
    poison(monkeypatch, float("nan"), 1)
    # one step in the epoch
    config = small("train.batch_size=100000", "train.on_nan=skip", f"train.average.name={average}")
    fitted = run(config, dataset, tmp_path)
    assert fitted.position.skipped == 1
    assert fitted.weights is not None
    torch.manual_seed(config.train.seed)
    fresh = build_model(config.model, dataset, "meta").dense_state()
    assert fresh.keys() == fitted.weights.network.keys()
    assert all(torch.equal(fresh[name], weight) for name, weight in fitted.weights.network.items())
    for table in tables_of(dataset.pipeline):
        assert torch.equal(fitted.weights.tables[table.name], initial_rows(table, 8, config.train.seed))


def test_a_skipped_batch_is_no_step_by_momentum_either(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step in an epoch: after the second, which is skipped, the weights are those of the first."""
    seen: list[dict[str, torch.Tensor]] = []
    honest = epochs.validate

    def looking(dmp: DistributedModelParallel, *rest: Any) -> dict[str, float]:
        seen.append({name: weight.clone() for name, weight in dmp.state_dict().items() if ".network." in name})
        return honest(dmp, *rest)

    steps: list[int] = []
    step = CombinedOptimizer.step

    def counted(optimizer: CombinedOptimizer, closure: Any = None) -> None:
        steps.append(1)
        step(optimizer, closure)

    monkeypatch.setattr(CombinedOptimizer, "step", counted)
    one = run(small("train.batch_size=100000", "train.on_nan=skip"), dataset, tmp_path / "one").weights
    of_one_step = len(steps)  # the optimizer's own, and those of what it is made of
    monkeypatch.setattr(epochs, "validate", looking)
    poison(monkeypatch, float("nan"), 2)
    run(small("train.batch_size=100000", "train.on_nan=skip", "train.epochs=2"), dataset, tmp_path / "two")
    assert one is not None
    assert len(seen) == 2
    assert (
        len(steps) == 2 * of_one_step > 0
    )  # TorchRec gives an optimizer no gradients then, with which most move nothing
    for name, weight in one.network.items():
        assert torch.equal(seen[0][f"model.network.{name}"], weight)
        assert torch.equal(seen[1][f"model.network.{name}"], weight)


def test_training_goes_on_after_what_was_skipped(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, float("inf"), 2, 5)
    fitted = run(small("train.batch_size=512", "train.on_nan=skip"), dataset, tmp_path)
    assert fitted.position.skipped == 2
    assert fitted.position.loss_steps == fitted.position.step - 2
    assert 0.3 < fitted.position.history[0]["train_loss"] < 0.8  # that of the others


TABLES = (
    Table(name="a", features=("a",), rows=5, pooling="sum"),
    Table(name="b", features=("b",), rows=5, pooling="sum"),
)


def test_a_skipped_batch_leaves_no_trace_in_running_statistics(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embeddings of one batch are NaN: so would be the statistics, and every batch after it."""
    honest, calls = MaskNet.embed, []

    def embed(model: MaskNet, *inputs: Any) -> torch.Tensor:
        emb_BFD = honest(model, *inputs)
        if model.training and isinstance(emb_BFD, torch.Tensor):
            calls.append(1)
        return emb_BFD * (float("nan") if model.training and len(calls) == 3 else 1.0)

    monkeypatch.setattr(MaskNet, "embed", embed)
    config = small("train.batch_size=512", "train.on_nan=skip", "model.hidden_norm=power", "model.embedding_norm=batch")
    fitted = run(config, dataset, tmp_path)
    assert fitted.position.skipped == 1
    assert fitted.weights is not None
    assert all(bool(weight.isfinite().all()) for weight in fitted.weights.network.values())
    assert 0.3 < (fitted.position.history[0]["logloss"] or 0) < 0.8


def test_scores_that_are_no_numbers_are_no_best_epoch(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = MaskNet.embed

    def embed(model: MaskNet, *inputs: Any) -> torch.Tensor:
        return honest(model, *inputs) * (1.0 if model.training else float("nan"))

    monkeypatch.setattr(MaskNet, "embed", embed)
    with pytest.raises(Failure, match="no epoch had a validation logloss that is a number"):
        run(small("train.batch_size=512"), dataset, tmp_path)


@pytest.fixture
def model() -> MaskNet:
    torch.manual_seed(0)
    config = MaskNetConfig(embedding_dim=4, blocks=2, block_width=8, head=(4,))
    return MaskNet(config, TABLES, ("a", "b"))


def test_the_place_is_a_field(model: MaskNet) -> None:
    emb_BFD = torch.randn(3, 2, 4)
    emb_BFD[1, 1, 2] = float("nan")
    assert first_broken(model, emb_BFD) == "the embeddings of b are not finite"


def test_the_place_is_a_weight(model: MaskNet) -> None:
    name, weight = list(model.network.named_parameters())[5]
    weight.data.view(-1)[0] = float("inf")
    assert first_broken(model, torch.randn(3, 2, 4)) == f"the weights {name} are not finite since the update before"


def test_the_place_is_a_block(model: MaskNet) -> None:
    for name, weight in model.network.named_parameters():
        if name.startswith("blocks.1."):
            weight.data.fill_(1e25)
    place = first_broken(model, torch.randn(3, 2, 4))
    assert place.startswith("it first appears in the output of blocks.1")


def test_what_a_cpu_has_no_pipeline_for_is_refused(dataset: PreparedDataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.pipeline semi_sync needs cuda; on cpu there is sparse_dist"):
        run(small("train.pipeline=semi_sync"), dataset, tmp_path)
    with pytest.raises(InputError, match=r"train\.on_nan skip needs train\.pipeline sparse_dist"):
        small("train.pipeline=semi_sync", "train.on_nan=skip")
