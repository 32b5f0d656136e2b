"""Changes of model that concern more than the model: a full disk, and another schema's fetched fields and log."""

import resource
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from features.dataset import PreparedDataset
from features.encoders import Hash, Identity, Scale, Vocabulary
from features.pipeline import FeaturePipeline
from features.prepare import prepare
from features.schema import Schema
from masknet.model import MaskNet
from serving.bundle import Bundle, fields_of, load_bundle, tables_of, write_bundle
from serving.members import Member
from tests.serving import test_swap_service
from tests.serving.conftest import CONFIG, ITEMS, Make
from tests.serving.running import Service
from tests.serving.test_swap_service import FAST, Registry, body, items_of, require_same

pytestmark = pytest.mark.long
registry, store = test_swap_service.registry, test_swap_service.store

CANDIDATES = list(range(ITEMS))
USER = {"name": "user", "type": "categorical"}
ITEM = {"name": "item", "type": "categorical", "encoder": "identity", "buckets": ITEMS}


def worker(service: Service) -> int:
    (found,) = (
        child.pid
        for child in psutil.Process(service.process.pid).children(recursive=True)
        if "_bentoml_impl.worker.service" in child.cmdline()
    )
    return int(found)


def written(path: Path, fields: list[dict[str, Any]], encoders: dict[str, Any], seed: int) -> Bundle:
    """A bundle of random weights over these fields, all of the context but the item."""
    context = [field["name"] for field in fields if field["name"] != "item"]
    plain = {"name": "s", "label": {"column": "click"}, "context": context, "fields": fields}
    schema = Schema.model_validate(plain)
    pipeline = FeaturePipeline.build(schema.fields, encoders)
    generator = torch.Generator().manual_seed(seed)
    model = MaskNet(CONFIG, tables_of(pipeline), fields_of(pipeline))
    network = {name: torch.randn(w.shape, generator=generator) / 2 for name, w in model.dense_state().items()}
    tables = {t.name: torch.randn(t.rows, CONFIG.embedding_dim, generator=generator) for t in tables_of(pipeline)}
    write_bundle(
        path,
        name="small",
        config=CONFIG,
        schema=schema,
        pipeline=pipeline,
        members=[Member(network, tables)],
        sampling_rate=1.0,
        run_id=None,
        evaluate=lambda scorer: {},
    )
    return load_bundle(path)


def test_a_version_that_finds_no_room_on_the_disk_is_taken_once_there_is(registry: Registry, make: Make) -> None:
    """A limit on the size of the worker's files stands for a full disk; it is lifted while the service runs."""
    buckets = 300_000  # a table of 4.8 MB
    hashed = {"name": "user", "type": "categorical", "encoder": "hash", "buckets": buckets}
    one = make("one", 1)
    two = written(registry.home / "two", [hashed, ITEM], {"user": Hash(buckets), "item": Identity(ITEMS)}, 2)
    assert sum(path.stat().st_size > 4e6 for path in two.path.rglob("*")) == 1
    registry.promote(registry.add(one.path))
    registry.add(two.path)
    with Service(registry.home, registry.champion, *FAST, MLFLOW_TRACKING_URI=registry.store) as service:
        resource.prlimit(worker(service), resource.RLIMIT_FSIZE, (3_000_000, resource.RLIM_INFINITY))
        registry.promote("2")
        service.wait_for(lambda: service.life()["postponed"])
        life = service.life()
        name = f"models:/{registry.name}/2"
        assert life["postponed"] == {"version": "2", "reason": f"the files of {name} cannot be copied", "tries": 1}
        assert (life["version"], life["refused"], life["source"]) == ("1", None, "registry")
        service.wait_for(lambda: service.metric("masknet_swaps_total", 'outcome="postponed"') == 1)
        require_same(service.rank(body("ann")), items_of(one, "ann"))
        assert httpx.get(f"{service.uri}/readyz").status_code == 200
        assert f"{name} is tried again in 15 s, version 1 goes on: " in service.told()
        assert "File too large" in service.told()
        assert "refused" not in service.told()
        left = [path for path in (registry.home / "cache").rglob("*") if "partial" in path.name]
        assert left == []
        resource.prlimit(worker(service), resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        service.wait_for(lambda: service.life()["version"] == "2")
        assert service.life()["postponed"] is None
        require_same(service.rank(body("ann")), items_of(two, "ann"))


def test_after_a_compatible_change_fields_are_fetched_and_logged_by_the_new_schema(
    registry: Registry, tmp_path: Path
) -> None:
    """`level` was text and is a number, `plan` is new; both come from a file, by the user."""
    users = Vocabulary(pa.array(["ann", "bob"]))
    text = {"name": "level", "type": "categorical", "encoder": "hash", "buckets": 9}
    number = {"name": "level", "type": "numeric", "encoder": "standard"}
    plan = {"name": "plan", "type": "categorical", "encoder": "hash", "buckets": 7}
    old = written(tmp_path / "old", [USER, ITEM, text], {"user": users, "item": Identity(ITEMS), "level": Hash(9)}, 1)
    new = written(
        tmp_path / "new",
        [USER, number, ITEM, plan],
        {"user": users, "level": Scale("standard", 3.0, 2.0), "item": Identity(ITEMS), "plan": Hash(7)},
        2,
    )
    pd.DataFrame({"user": ["ann", "bob"], "level": [7, 2]}).to_parquet(tmp_path / "users.parquet")
    registry.promote(registry.add(old.path))
    registry.client.set_model_version_tag(registry.name, registry.add(new.path), "masknet.schema", "compatible")
    settings = ["store.kind=parquet", f"store.url={tmp_path}/users.parquet", "store.key=user", "store.fields=[level]"]
    settings += [f"log.folder={tmp_path}/log", "log.share=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    asked = {"context": {"user": "ann"}, "candidates": {"item": CANDIDATES}, "top_k": ITEMS}
    with Service(tmp_path, registry.champion, *FAST, *words, MLFLOW_TRACKING_URI=registry.store) as service:
        before = service.rank(asked)
        registry.promote("2")
        service.wait_for(lambda: service.life()["version"] == "2")
        after = service.rank({**asked, "context": {"user": "ann", "plan": "gold"}})
    rows = {"user": ["ann"] * ITEMS, "item": CANDIDATES}
    expected = {
        "1": old.scorer.score({**rows, "level": ["7"] * ITEMS}),
        "2": new.scorer.score({**rows, "level": [7.0] * ITEMS, "plan": ["gold"] * ITEMS}),
    }
    assert np.abs(expected["1"] - expected["2"]).max() > 1e-3
    for reply in (before, after):
        score_N = np.array([item["score"] for item in sorted(reply["items"], key=lambda item: item["index"])])
        np.testing.assert_allclose(score_N, expected[reply["model"]["version"]], rtol=0, atol=2e-6)
    files = sorted((tmp_path / "log").glob("*.parquet"))
    assert [pq.read_table(file)["version"].unique().to_pylist() for file in files] == [["1"], ["2"]]
    for file, bundle, reply in zip(files, (old, new), (before, after), strict=True):
        logged = pq.read_table(file)
        pq.write_table(logged.append_column("click", pa.array([1, 0] * (ITEMS // 2))), file)
        prepare(bundle.schema, {"test": [str(file)]}, tmp_path / file.stem, pipeline=bundle.pipeline)
        again_N = bundle.scorer.score_encoded(PreparedDataset.open(tmp_path / file.stem).split("test"))
        np.testing.assert_allclose(again_N, expected[reply["model"]["version"]], rtol=0, atol=1e-6)
