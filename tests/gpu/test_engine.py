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
from features.pipeline import FeaturePipeline
from features.schema import Schema
from masknet.config import MaskNetConfig
from masknet.model import MaskNet
from serving.backends.gpu import GPUBackend
from serving.bundle import fields_of, load_bundle, tables_of, write_bundle
from serving.members import Member
from serving.ranking import engine as engine_module
from serving.ranking.engine import RankingEngine
from serving.ranking.transfer import OneCopy
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
    pipeline = FeaturePipeline.build(SCHEMA.fields, ENCODERS)
    config = MaskNetConfig(embedding_dim=d, blocks=2, block_width=h, head=(h,))
    members = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = MaskNet(config, tables_of(pipeline), fields_of(pipeline))
        tables = {table.name: torch.randn(table.rows, d) for table in tables_of(pipeline)}
        members.append(Member(model.dense_state(), tables))
    out = tmp_path_factory.mktemp("engine") / "bundle"
    write_bundle(
        out,
        name="gpu",
        config=config,
        schema=SCHEMA,
        pipeline=pipeline,
        members=members,
        sampling_rate=0.5,
        run_id=None,
        evaluate=lambda scorer: {},
    )
    return out


def candidates_of(count: int) -> dict[str, list[Any]]:
    random = np.random.default_rng(count)
    return {
        "item": random.integers(220, size=count).astype(str).tolist(),
        "tags": [random.choice(WORDS, random.integers(4)).tolist() for _ in range(count)],
        "price": random.uniform(0, 100, count).tolist(),
    }


def test_scores_are_the_reference_scorer_s(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not CUDA:  # what the engine does for a device, on the one that there is

        def made(network: Any, *args: Any, **kwargs: Any) -> OneCopy:
            return OneCopy(GPUBackend("fp32", network, torch.device(DEVICE), torch.float32), DEVICE)

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
