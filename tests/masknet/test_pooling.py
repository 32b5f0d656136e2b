"""The configuration's pooling goes before the tables' own."""

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from masknet.config import MaskNetConfig
from masknet.model import MaskNet, Table

TABLES = (
    Table(name="tags", features=("tags",), rows=4, pooling="mean"),
    Table(name="genres", features=("genres",), rows=3, pooling="mean"),
)
IDS = KeyedJaggedTensor(
    keys=["tags", "genres"], values=torch.tensor([3, 0, 2, 1, 2]), lengths=torch.tensor([3, 0, 2, 0], dtype=torch.int32)
)


def test_only_the_table_that_is_named_pools_otherwise() -> None:
    config = MaskNetConfig(embedding_dim=4, pooling={"tags": "sum"})
    model = MaskNet(config, TABLES, ("tags", "genres"))
    tags, genres = (bag.weight for bag in model.embeddings.embedding_bags.values())
    emb_BFD = model.embed(IDS, torch.empty(2, 0), torch.empty(2, 0))
    zeros = torch.zeros(4)
    expected = [[tags[3] + tags[0] + tags[2], (genres[1] + genres[2]) / 2], [zeros, zeros]]
    torch.testing.assert_close(emb_BFD, torch.stack([torch.stack(row) for row in expected]), rtol=1e-6, atol=0)


def test_it_is_kept_with_the_model_and_of_no_unknown_table() -> None:
    config = MaskNetConfig(pooling={"genre": "sum"})
    assert MaskNetConfig.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(ValueError, match="pooling: genre is no table; there are tags, genres"):
        MaskNet(config, TABLES, ("tags", "genres"))
