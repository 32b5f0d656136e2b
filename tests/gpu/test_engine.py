"""The ranking engine with its network on the device: the reference scorer's scores, from requests of any size.

Without CUDA the same classes run on the CPU, through padding and buffers. It needs what serving imports without HTTP.

Legend: N candidates.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchrec")
pytest.importorskip("polars_hash")

import numpy as np
import pyarrow as pa

from features.encoders import AnyEncoder, Cross, Hash, Identity, Scale, Vocabulary
from features.errors import InputError
from features.pipeline import FeaturePipeline
from features.schema import Schema
from masknet.config import MaskNetConfig
from masknet.model import MaskNet
from serving.backends import check as check_module
from serving.backends.check import check_backends
from serving.backends.gpu import GPUBackend
from serving.backends.record import Backends
from serving.bundle import Bundle, fields_of, load_bundle, tables_of, write_bundle
from serving.members import Member
from serving.ranking import engine as engine_module
from serving.ranking.engine import RankingEngine
from serving.scorer import Scorer
from tests.gpu.settings import CUDA, DEVICE, d, h

WORDS = [f"w{i}" for i in range(50)]
FIELDS: list[dict[str, Any]] = [
    {"name": "user", "type": "categorical"},
    {"name": "age", "type": "numeric", "encoder": "standard"},
    {"name": "item", "type": "categorical", "encoder": "identity", "buckets": 200},
    {"name": "tags", "type": "list", "encoder": "hash", "buckets": 40},
    {"name": "price", "type": "numeric", "encoder": "log1p"},
    {"name": "pair", "type": "cross", "of": ["user", "item"], "buckets": 90},
]
SCHEMA = Schema.model_validate(
    {"name": "gpu", "label": {"column": "click"}, "context": ["user", "age"], "fields": FIELDS}
)
ENCODERS: dict[str, AnyEncoder] = {
    "user": Vocabulary(pa.array(WORDS)),
    "age": Scale("standard", 40.0, 10.0),
    "item": Identity(200),
    "tags": Hash(40),
    "price": Scale("log1p"),
    "pair": Cross(90),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two members with random weights."""
    return written(tmp_path_factory.mktemp("engine") / "bundle").path


def written(out: Path, **rest: Any) -> Bundle:
    pipeline = FeaturePipeline.build(SCHEMA.fields, ENCODERS)
    config = MaskNetConfig(embedding_dim=d, blocks=2, block_width=h, head=(h,))
    members = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = MaskNet(config, tables_of(pipeline), fields_of(pipeline))
        tables = {table.name: torch.randn(table.rows, d) for table in tables_of(pipeline)}
        members.append(Member(model.dense_state(), tables))
    return write_bundle(
        out,
        name="gpu",
        config=config,
        schema=SCHEMA,
        pipeline=pipeline,
        members=members,
        sampling_rate=0.5,
        run_id=None,
        evaluate=lambda scorer: {},
        **rest,
    )


def candidates_of(count: int) -> dict[str, list[Any]]:
    random = np.random.default_rng(count)
    return {
        "item": random.integers(220, size=count).astype(str).tolist(),
        "tags": [random.choice(WORDS, random.integers(4)).tolist() for _ in range(count)],
        "price": random.uniform(0, 100, count).tolist(),
    }


def test_scores_are_the_reference_scorer_s(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not CUDA:  # what the engine does for a device, on the one that there is

        def made(network: Any, *args: Any, **kwargs: Any) -> GPUBackend:
            return GPUBackend("fp32", network, torch.device(DEVICE), torch.float32)

        monkeypatch.setattr(engine_module, "make_backend", made)
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = RankingEngine.load(path, "1", device=DEVICE)
    scorer = load_bundle(path).scorer
    for count in (1, 5, 64, 700, 2500, 3):
        candidates = candidates_of(count)
        expected_N = scorer.score(candidates | {"user": ["w7"] * count, "age": [31.0] * count})
        best = engine.rank({"user": "w7", "age": 31.0}, candidates, count)
        found_N = np.empty(count, np.float32)
        found_N[[item.index for item in best]] = [item.score for item in best]
        np.testing.assert_allclose(found_N, expected_N, rtol=0, atol=2e-6)
        assert [item.score for item in best] == sorted(found_N.tolist(), reverse=True)
    whole = candidates | {"user": ["w1", "w2", "w3"], "age": [20.0, None, 70.0]}
    np.testing.assert_allclose(engine.predict(whole), scorer.score(whole), rtol=0, atol=2e-6)
    assert engine.about()["device"] == DEVICE


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_fast_is_what_the_check_on_the_device_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's score is the same in any batch, and what the engine answers is within the bound that the check saw."""
    monkeypatch.setattr(check_module, "MOST_LOST", 1e-3)  # of random weights
    count = 40_000
    random, rows = np.random.default_rng(1), candidates_of(count)
    rows |= {"user": random.choice(WORDS, count).tolist(), "age": random.uniform(10, 90, count).tolist()}

    def check(scorer: Scorer) -> Backends:
        encoded = scorer.pipeline.encode(rows)
        label_N = (random.random(count) < scorer.score_encoded(encoded)).astype(np.int64)
        return check_backends(scorer, encoded, label_N, "drawn", devices=["cuda"])

    bundle = written(tmp_path / "checked", check=check)
    assert bundle.backends is not None
    record = bundle.backends.devices["cuda"]
    assert record.versions["cuda"] == torch.cuda.get_device_name()
    verdict = record.backends["bf16"]
    assert verdict.reason is None
    assert verdict.batch_difference is not None
    assert verdict.batch_difference <= 1e-6
    assert verdict.largest_difference is not None
    assert 1e-6 < verdict.largest_difference < 0.02
    with pytest.raises(InputError, match="no check on cpu"):
        RankingEngine.load(bundle.path, "1", backend="fast")
    engine = RankingEngine.load(bundle.path, "1", device=DEVICE, backend="fast")
    candidates = candidates_of(700)
    whole_N = engine.predict(candidates | {"user": ["w7"] * 700, "age": [31.0] * 700})
    expected_N = bundle.scorer.score(candidates | {"user": ["w7"] * 700, "age": [31.0] * 700})
    assert float(np.abs(whole_N - expected_N).max()) <= 2 * verdict.largest_difference
    alone = {name: values[3:4] for name, values in candidates.items()}
    (first,) = engine.rank({"user": "w7", "age": 31.0}, alone, 1)
    among = engine.rank({"user": "w7", "age": 31.0}, candidates, 700)
    assert first.score == pytest.approx(next(item.score for item in among if item.index == 3), abs=1e-6)
