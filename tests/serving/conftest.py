"""A small bundle by hand: random weights over a user and an item, no training."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
import torch

from features.encoders import Identity, Vocabulary
from features.files import sha256_file
from features.pipeline import FeaturePipeline
from features.schema import Schema
from masknet.config import MaskNetConfig
from masknet.model import MaskNet
from serving.bundle import Bundle, fields_of, load_bundle, tables_of, write_bundle
from serving.members import Member

if TYPE_CHECKING:
    from tests.serving.running import Service

ITEMS = 60
FIELDS = [{"name": "user", "type": "categorical"}, {"name": "item", "type": "categorical", "encoder": "identity"}]
FIELDS[1]["buckets"] = ITEMS  # type: ignore[assignment]
SCHEMA = Schema.model_validate({"name": "s", "label": {"column": "click"}, "context": ["user"], "fields": FIELDS})
PIPELINE = FeaturePipeline.build(SCHEMA.fields, {"user": Vocabulary(pa.array(["ann", "bob"])), "item": Identity(ITEMS)})
CONFIG = MaskNetConfig(embedding_dim=4, blocks=1, block_width=6, head=())

Make = Callable[..., Bundle]


def member(seed: int, config: MaskNetConfig = CONFIG) -> Member:
    """Weights far from those of any initialization."""
    generator = torch.Generator().manual_seed(seed)
    model = MaskNet(config, tables_of(PIPELINE), fields_of(PIPELINE))
    network = {name: torch.randn(w.shape, generator=generator) / 2 for name, w in model.dense_state().items()}
    tables = {table.name: torch.randn(table.rows, 4, generator=generator) for table in tables_of(PIPELINE)}
    return Member(network, tables, f"run {seed}")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a bundle of members with the given seeds and opens it from disk; keywords are `write_bundle`'s."""

    def made(name: str = "bundle", *seeds: int, **changed: Any) -> Bundle:
        config = changed.get("config", CONFIG)
        given = {"name": "small", "config": config, "schema": SCHEMA, "pipeline": PIPELINE, "sampling_rate": 0.2}
        given |= {"run_id": "run", "evaluate": lambda scorer: {}}
        write_bundle(tmp_path / name, members=[member(seed, config) for seed in seeds or (1,)], **given | changed)
        return load_bundle(tmp_path / name)

    return made


@pytest.fixture
def rows() -> dict[str, list[Any]]:
    """Every item, shown to a user."""
    return {"user": ["ann"] * ITEMS, "item": list(range(ITEMS))}


@pytest.fixture
def reseal() -> Callable[..., None]:
    """Makes the digests fit again after a change, as somebody would who edits a bundle on purpose."""

    def resealed(bundle: Path, **changed: Any) -> None:
        manifest = json.loads((bundle / "manifest.json").read_text()) | changed
        manifest["files"] = {n: sha256_file(bundle / n) for n in manifest["files"] if (bundle / n).exists()}
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        (bundle / "manifest.sha256").write_text(sha256_file(bundle / "manifest.json"))

    return resealed


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of one member on disk."""
    path = tmp_path_factory.mktemp("small") / "bundle"
    given = {"name": "small", "config": CONFIG, "schema": SCHEMA, "pipeline": PIPELINE, "sampling_rate": 0.2}
    write_bundle(path, members=[member(1)], run_id="run", evaluate=lambda scorer: {}, **given)  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="session")
def service(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Service"]:
    """It, served by a process of its own; for tests that leave it as it is."""
    from tests.serving.running import Service

    with Service(tmp_path_factory.mktemp("service"), str(small_bundle), "--set", "limits.drain_seconds=0") as served:
        yield served


@pytest.fixture(scope="session")
def every_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Service"]:
    """A process that serves every kind of field; for tests that leave it as it is. The bundle is `every_kind`'s."""
    from tests.serving.every_kind import write_every_kind
    from tests.serving.running import Service

    home = tmp_path_factory.mktemp("every-service")
    options = ("--set", "limits.drain_seconds=0", "--set", "limits.deadline_ms=30000")  # a busy machine is no failure
    with Service(home, str(write_every_kind(home / "bundle")), *options) as served:
        yield served
