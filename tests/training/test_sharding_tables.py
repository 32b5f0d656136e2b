"""Tables that several fields share and fields with values, through TorchRec's sharding, pipeline and the loop."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from features.dataset import LABEL, WEIGHT, SplitFiles
from features.encoders import Identity, Scale
from features.loader import BatchLoader
from features.pipeline import FeaturePipeline
from features.schema import Schema
from masknet.model import MaskNet, Table, initial_rows
from serving.bundle import fields_of, tables_of
from training.config import Config
from training.distributed import World, join_world
from training.embeddings.managed import ManagedIds
from training.embeddings.sharding import fill_tables, gather_tables, shard
from training.fit.checkpoints import Checkpoints
from training.fit.epochs import fit_epochs
from training.fit.loop import Loop
from training.fit.setting import Setting
from training.fit.starting import Weights
from training.fit.task import ClickTask
from training.progress import Silent

ROWS, VALID = 2000, 400
SCHEMA = Schema.model_validate(
    {
        "name": "shared",
        "label": {"column": "click"},
        "fields": [
            {"name": "price", "type": "numeric", "encoder": "standard"},
            {"name": "history", "type": "list", "share_with": "item"},
            {"name": "item", "type": "categorical", "encoder": "identity", "buckets": 20},
            {"name": "user", "type": "categorical", "encoder": "identity", "buckets": 5},
            {"name": "age", "type": "numeric", "encoder": "standard", "normalize": True},
        ],
    }
)
PIPELINE = FeaturePipeline.build(
    SCHEMA.fields, {"price": Scale("standard"), "item": Identity(20), "user": Identity(5), "age": Scale("standard")}
)
CONFIG = Config.model_validate(
    {
        "experiment": "shared",
        "model": {"embedding_dim": 4, "blocks": 2, "block_width": 16, "head": [8]},
        "optimizer": {"dense": {"lr": 0.01}},
        "train": {"epochs": 3, "batch_size": 128},
        "tracking": {"registered_model": "shared"},
    }
)
TABLES = (
    Table(name="item", features=("history", "item"), rows=22, pooling="mean"),
    Table(name="user", features=("user",), rows=7, pooling="sum"),
)


def split(folder: Path, name: str, rows: int) -> SplitFiles:
    """Clicks on what is cheap and was seen before, encoded."""
    random = np.random.default_rng(len(name))
    price, item = random.normal(size=rows), random.integers(0, 20, rows)
    history = [random.integers(0, 20, random.integers(0, 4)).tolist() for _ in range(rows)]
    chance = np.where((price < 0) | [i in seen for i, seen in zip(item, history, strict=True)], 0.95, 0.05)
    price = [None if draw < 0.1 else value for value, draw in zip(price.tolist(), random.random(rows), strict=True)]
    columns = {"price": price, "history": history, "item": item, "user": random.integers(0, 5, rows)}
    table = PIPELINE.encode(pa.table({**columns, "age": random.normal(40.0, 10.0, rows)}))
    table = table.append_column(LABEL, pa.array((random.random(rows) < chance).astype(np.float32)))
    path = folder / f"{name}.parquet"
    pq.write_table(table.append_column(WEIGHT, pa.array(np.ones(rows))), path)
    return SplitFiles([path])


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SplitFiles]:
    folder = tmp_path_factory.mktemp("splits")
    return {"train": split(folder, "train", ROWS), "valid": split(folder, "valid", VALID)}


@pytest.fixture
def world() -> Iterator[World]:
    with join_world() as world:
        yield world


def a_model(device: str = "cpu") -> MaskNet:
    torch.manual_seed(1)
    return MaskNet(CONFIG.model, tables_of(PIPELINE), fields_of(PIPELINE), device=device)


def trained(world: World, splits: dict[str, SplitFiles], rate: float, folder: Path) -> tuple[dict[str, float], Weights]:
    """The last epoch's metrics and weights."""
    task = ClickTask(a_model("meta"), "fp32", world.device.type)
    dmp = shard(task, TABLES, CONFIG, world)
    fill_tables(dmp, TABLES, lambda table: initial_rows(table, 4, 1))
    train = BatchLoader(splits["train"], PIPELINE, batch_size=128, shuffle_seed=1)
    checkpoints = Checkpoints(folder / "checkpoints", 1, world, pytest.fail)
    setting = Setting(
        passes=[("epoch", train)] * CONFIG.train.epochs,
        managed=ManagedIds(PIPELINE, TABLES, dim=4, seed=1, world=world),
        checkpoints=checkpoints,
        failed=folder / "failed",
        world=world,
        observer=Silent(),
    )
    valid = BatchLoader(splits["valid"], PIPELINE, batch_size=128)
    position = fit_epochs(Loop(dmp, CONFIG, setting), valid, CONFIG.train.early_stop, rate)
    checkpoints.close()
    metrics = {name: value for name, value in position.history[-1].items() if value is not None}
    return metrics, Weights(task.model.dense_state(), gather_tables(dmp, [table.name for table in TABLES]))


def test_one_table_per_owner_with_the_lists_pooling() -> None:
    assert tables_of(PIPELINE) == TABLES


def test_sharded_tables_start_with_their_own_rows(world: World) -> None:
    dmp = shard(ClickTask(a_model("meta"), "fp32", world.device.type), TABLES, CONFIG, world)
    fill_tables(dmp, TABLES, lambda table: initial_rows(table, 4, 7))
    gathered = gather_tables(dmp, ["item", "user"])
    assert list(gathered) == ["item", "user"]
    for table in TABLES:
        assert torch.equal(gathered[table.name], initial_rows(table, 4, 7))


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_what_is_learned_and_how_it_is_validated(
    world: World, splits: dict[str, SplitFiles], rate: float, tmp_path: Path
) -> None:
    metrics, weights = trained(world, splits, rate, tmp_path)
    assert metrics["auc"] > 0.85  # the labels allow about .95; prices decide nine rows in ten
    start = a_model().dense_state()
    assert start.keys() == weights.network.keys()
    assert all(not torch.equal(start[name], weight) for name, weight in weights.network.items())
    for table in TABLES:
        assert (weights.tables[table.name] != initial_rows(table, 4, 1)).any(1)[2:].all()
    # the same validation by the unsharded model, with the correction for dropped negatives written out in odds
    model = a_model().eval()
    model.load_weights(weights.network, list(weights.tables.values()))
    batches = list(BatchLoader(splits["valid"], PIPELINE, batch_size=VALID).epoch(0))
    with torch.no_grad():
        odds_N = np.exp(model(*batches[0].inputs).double().numpy()) * rate
    score_N, label_N = odds_N / (1 + odds_N), batches[0].label_B.numpy()
    loss = -np.mean(np.where(label_N == 1, np.log(score_N), np.log(1 - score_N)))
    assert metrics["logloss"] == pytest.approx(float(loss), rel=1e-5)
