"""Fixtures that several rooms' tests share: a slice of MovieLens-100k, prepared, and a small model trained on it."""

import os
from pathlib import Path

import polars as pl
import pytest
import torch

# Before anything imports these libraries: no usage reports from tests, no pickle, no noise; kernels interpreted where
# there is no GPU.
os.environ.update(
    {
        "BENTOML_DO_NOT_TRACK": "True",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1",
    }
)

from rich.console import Console

from features import movielens
from features.dataset import PreparedDataset
from features.prepare import prepare
from features.schema import load_schema
from features.splits import SplitRule
from serving.bundle import Bundle, load_bundle
from training.config import Config, load_config

CONFIG = Path(__file__).parent.parent / "training" / "configs" / "movielens.yaml"
SMALL = ["model.block_width=16", "model.head=[8]", "model.embedding_dim=8", "train.epochs=2", "train.batch_size=512"]


@pytest.fixture(scope="session")
def raw_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6,000 real impressions of 120 users, all of whose rows are readable."""
    path = tmp_path_factory.mktemp("raw") / "clicks.parquet"
    movielens.write_flat(path)
    flat = pl.read_parquet(path).filter(pl.col("year").str.contains(r"^\d{4}$"))
    users = flat["user_id"].unique().sort().head(120)
    flat.filter(pl.col("user_id").is_in(users.implode())).head(6000).write_parquet(path)
    return path


@pytest.fixture(scope="session")
def data(raw_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The impressions as a prepared data set, split by time."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(load_schema(movielens.SCHEMA), {"input": [str(raw_rows)]}, out, split=SplitRule.parse("time:0.8,0.1,0.1"))
    return out


@pytest.fixture(scope="session")
def dataset(data: Path) -> PreparedDataset:
    return PreparedDataset.open(data)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A small model, tracked in a store of the tests' own."""
    store = tmp_path_factory.mktemp("mlflow")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{store}/mlflow.db"
    return load_config(CONFIG, SMALL)


@pytest.fixture(scope="session")
def bundle_path(config: Config, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle trained on the slice, registered as version 1."""
    from training.train import train

    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)  # MLflow puts its artifacts below the working directory
        result = train(config, data, home / "out", Console(stderr=True))
    assert result is not None
    return Path(result["bundle"])


@pytest.fixture(scope="session")
def bundle(bundle_path: Path) -> Bundle:
    return load_bundle(bundle_path)
