"""The embeddings' prior: a pass over the data counts every id once, whatever its frequency."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.dataset import PreparedDataset, SplitFiles
from features.encoders import UNKNOWN
from features.prepare import prepare
from features.schema import Schema
from training.config import load_config
from training.distributed import World, join_world
from training.embeddings.prior import EmbeddingPrior, count_ids
from training.fit.dataset import Going, fit_dataset
from training.progress import Silent

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Single ids, lists, a shared table, a field that is hidden at times, and a field with values."""
    home, random = tmp_path_factory.mktemp("lists"), np.random.default_rng(5)
    rows = 400
    frame = pd.DataFrame(
        {
            "user": random.integers(0, 9, rows).astype(str),
            "friend": random.integers(0, 9, rows).astype(str),
            "tags": [" ".join(random.choice(list("abcde"), random.integers(0, 4))) for _ in range(rows)],
            "price": random.random(rows),
            "click": random.integers(0, 2, rows),
        }
    )
    for name in ("train", "valid", "test"):
        frame.to_parquet(home / f"{name}.parquet")
    fields = [
        {"name": "user", "type": "categorical", "unknown_rate": 0.25},
        {"name": "friend", "type": "categorical", "share_with": "user"},
        {"name": "price", "type": "numeric", "encoder": "standard"},
        {"name": "tags", "type": "list", "separator": " ", "encoder": "vocabulary"},
    ]
    schema = Schema.model_validate({"name": "lists", "label": {"column": "click"}, "fields": fields})
    sources = {name: [str(home / f"{name}.parquet")] for name in ("train", "valid", "test")}
    prepare(schema, sources, home / "data")
    return PreparedDataset.open(home / "data")


def counted(dataset: PreparedDataset) -> dict[str, Counter[int]]:
    table = dataset.split("train")
    users, friends = (table[name].to_pylist() for name in ("user", "friend"))
    tags = [tag for row in table["tags"].to_pylist() for tag in row]
    return {"user": Counter(users), "friend": Counter(friends), "tags": Counter(tags)}


def test_ids_are_counted_by_table_and_as_training_sees_them(lists: PreparedDataset) -> None:
    with join_world() as world:
        found = count_ids([lists.files("train")], lists.pipeline, world)
        twice = count_ids(2 * [lists.files("train")], lists.pipeline, world)
    raw = counted(lists)
    assert found.keys() == {"user", "friend", "tags"}  # price has no ids
    assert torch.equal(found["user"], found["friend"])
    for identity, count in enumerate(found["user"].tolist()):
        expected = 0.75 * raw["user"][identity] + raw["friend"][identity] + (100 if identity == UNKNOWN else 0)
        assert count == pytest.approx(expected)
    assert found["tags"].tolist() == [raw["tags"][identity] for identity in range(len(found["tags"]))]
    assert torch.equal(twice["tags"], 2 * found["tags"])


def test_a_pass_counts_every_id_once(lists: PreparedDataset) -> None:
    """Of embeddings that depend on the id alone, rare and frequent ones add the same to a pass."""
    counts = {"tags": torch.tensor([0.0, 1.0, 4.0, 5.0])}
    prior = EmbeddingPrior(3.0, counts, ["other", "tags"], CPU)
    ids = torch.tensor([1, 2, 2, 2, 2, 3, 3, 3, 3, 3])
    table = torch.tensor([[9.0, 9.0], [1.0, 2.0], [3.0, 0.0], [0.5, 0.5]])
    emb_BFd = torch.stack([torch.ones(10, 2), table[ids]], 1)
    penalty_B = prior(KeyedJaggedTensor(["tags"], ids, lengths=torch.ones(10, dtype=torch.int32)), emb_BFd)
    assert penalty_B.sum().item() == pytest.approx(3.0 / 2 * (5.0 + 9.0 + 0.5))  # neither `other` nor the id 0
    assert penalty_B[0].item() == pytest.approx(3.0 / 2 * 5.0)
    assert penalty_B[1].item() == pytest.approx(3.0 / 2 * 9.0 / 4)


def test_of_a_list_the_shares_of_its_ids_add_up() -> None:
    counts = {"tags": torch.tensor([1.0, 2.0, 10.0])}
    prior = EmbeddingPrior(2.0, counts, ["tags"], CPU)
    ids = KeyedJaggedTensor(["tags"], torch.tensor([1, 2, 0]), lengths=torch.tensor([2, 1], dtype=torch.int32))
    emb_BFd = torch.tensor([[[1.0, 1.0]], [[2.0, 0.0]]], requires_grad=True)
    penalty_B = prior(ids, emb_BFd)
    assert penalty_B.tolist() == pytest.approx([2.0 * (0.5 + 0.1), 4.0])
    penalty_B.sum().backward()  # type: ignore[no-untyped-call]
    assert emb_BFd.grad is not None
    assert emb_BFd.grad.flatten().tolist() == pytest.approx([1.2, 1.2, 4.0, 0.0])


def test_ranks_count_a_share_each(lists: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with join_world() as world:
        whole = count_ids([lists.files("train")], lists.pipeline, world)
    pq.write_table(lists.split("train"), tmp_path / "train.parquet", row_group_size=90)
    split = SplitFiles([tmp_path / "train.parquet"])
    monkeypatch.setattr("training.embeddings.prior.sum_over_ranks", lambda count_I: count_I)
    parts = [count_ids([split], lists.pipeline, World(rank=rank, size=3, device=CPU)) for rank in range(3)]
    assert all(part["tags"].sum() > 0 for part in parts)
    for name, count_I in whole.items():
        assert torch.allclose(sum(part[name] for part in parts), count_I)


@pytest.mark.long
def test_training_pays_for_it(lists: PreparedDataset, tmp_path: Path) -> None:
    """The stronger it is, the smaller embeddings stay."""
    path = tmp_path / "config.yaml"
    path.write_text("experiment: lists\ntracking: {registered_model: lists}\n")
    shape = ["model.block_width=8", "model.head=[4]", "model.embedding_dim=4", "train.batch_size=40", "train.epochs=4"]
    norms = {}
    for strength in (0, 10, 1000):
        config = load_config(path, [*shape, f"optimizer.embedding_prior={strength}", "optimizer.sparse.lr=0.1"])
        with join_world() as world:
            going = Going(checkpoints=tmp_path / str(strength), failed=tmp_path, observer=Silent())
            weights = fit_dataset(config, lists, world, going).weights
        assert weights is not None
        norms[strength] = float(weights.tables["user"].square().mean())
    assert norms[0] > 2 * norms[10] > 10 * norms[1000]
