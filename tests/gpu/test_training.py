"""The whole way on one device: sharded tables train, the bundle is written, and the kernels give the scores of a CPU.

On CUDA the tables are row-wise in device memory and in host memory behind a cache; without, what a CPU has. It needs
TorchRec, FBGEMM and what `masknet prepare` imports, and is skipped where they are missing.
"""

from pathlib import Path

import pytest
import torch

pytest.importorskip("torchrec")
pytest.importorskip("polars_hash")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.batches import EncodedRows
from features.dataset import LABEL, PreparedDataset
from features.metrics import auc, logloss
from features.prepare import prepare
from features.schema import Schema
from features.splits import SplitRule
from masknet.kernels import dispatch
from masknet.serving_model import ServingModel
from serving.bundle import load_bundle, write_bundle
from serving.members import Member
from serving.scorer import Scorer
from tests.gpu.settings import CUDA, DEVICE
from training.config import Config
from training.distributed import join_world
from training.fit.dataset import Going, fit_dataset
from training.fit.starting import build_model
from training.progress import Silent

ROWS, BUCKETS = (400_000, 10_000) if CUDA else (4_000, 100)
PLACED = (
    {"a": {"type": "row_wise", "kernel": "fused"}, "b": {"type": "row_wise", "kernel": "fused_uvm_caching"}}
    if CUDA
    else {"a": {"type": "table_wise", "kernel": "fused"}, "b": {"type": "data_parallel"}}
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Clicks that one of three fields decides."""
    home, random = tmp_path_factory.mktemp("gpu"), np.random.default_rng(0)
    columns = {name: random.integers(BUCKETS, size=ROWS) for name in "abc"}
    label_N = (random.random(ROWS) < np.where(columns["a"] % 2, 0.9, 0.1)).astype(np.int64)
    pq.write_table(pa.table({"click": label_N, **columns}), home / "raw.parquet")
    fields = [{"name": name, "type": "categorical", "encoder": "identity", "buckets": BUCKETS} for name in columns]
    schema = Schema.model_validate({"name": "gpu", "label": {"column": "click"}, "fields": fields})
    split = SplitRule.parse("random:0.8,0.1,0.1")
    prepare(schema, {"input": [str(home / "raw.parquet")]}, home / "data", split=split)
    return PreparedDataset.open(home / "data")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_trained_is_scored_by_the_kernels_as_by_a_cpu(
    data: PreparedDataset, tmp_path: Path, precision: str
) -> None:
    config = Config.model_validate(
        {
            "experiment": "gpu",
            "model": {"embedding_dim": 8, "blocks": 2, "block_width": 64 if CUDA else 16, "head": [16]},
            "optimizer": {"dense": {"lr": 0.01}, "sparse": {"name": "rowwise_adagrad", "lr": 0.3}},
            "sharding": {"tables": PLACED},
            "train": {"epochs": 3, "batch_size": 2048 if CUDA else 128, "precision": precision},
            "tracking": {"registered_model": "gpu"},
        }
    )
    with join_world() as world:
        going = Going(checkpoints=tmp_path / "checkpoints", failed=tmp_path / "failed", observer=Silent())
        weights = fit_dataset(config, data, world, going).weights
    assert weights is not None
    write_bundle(
        tmp_path / "bundle",
        name="gpu",
        config=config.model,
        schema=data.schema,
        pipeline=data.pipeline,
        sampling_rate=1.0,
        members=[Member(weights.network, weights.tables)],
        run_id="none",
        evaluate=lambda scorer: {},
    )
    scorer: Scorer = load_bundle(tmp_path / "bundle").scorer
    test = data.split("test")
    expected_N = scorer.score_encoded(test)  # on the CPU
    assert (auc(test[LABEL].to_numpy(), expected_N) or 0) > 0.8  # .9 is the best possible
    rows = EncodedRows.of(data.pipeline.as_served(test), data.pipeline.layout)
    index_N = np.arange(min(rows.num_rows, 2000 if CUDA else 20))
    model = ServingModel(scorer.models[0], data.pipeline.layout.ids).eval().to(DEVICE)
    with torch.inference_mode(), dispatch.kernels("fused"):
        logit_N = model(*(part.to(DEVICE) for part in rows.gather(index_N)))
    np.testing.assert_allclose(logit_N.sigmoid().cpu().numpy(), expected_N[index_N], atol=1e-6)


def test_averages_are_validated_and_kept(data: PreparedDataset, tmp_path: Path) -> None:
    """Of tables by rows on CUDA: what validation has told is what a CPU finds of the weights that are kept."""
    config = Config.model_validate(
        {
            "experiment": "gpu",
            "model": {"embedding_dim": 8, "blocks": 1, "block_width": 16, "head": [], "embedding_dropout": 0.1},
            "optimizer": {"dense": {"lr": 0.01}, "sparse": {"name": "rowwise_adagrad", "lr": 0.3}},
            "sharding": {"type": "row_wise" if CUDA else "table_wise"},
            "train": {"epochs": 2, "batch_size": 2048 if CUDA else 128, "average": {"name": "ema"}},
            "tracking": {"registered_model": "gpu"},
        }
    )
    with join_world() as world:
        going = Going(checkpoints=tmp_path / "checkpoints", failed=tmp_path / "failed", observer=Silent())
        fitted = fit_dataset(config, data, world, going)
    assert fitted.weights is not None
    model = build_model(config.model, data)
    model.load_weights(fitted.weights.network, [fitted.weights.tables[name] for name in model.table_names])
    valid = data.split("valid")
    score_N = Scorer(data.pipeline, [model], 1.0, {}).score_encoded(valid)
    told = fitted.position.history[fitted.position.best_epoch]["logloss"]
    assert told == pytest.approx(logloss(valid[LABEL].to_numpy(), score_N), rel=1e-5)
