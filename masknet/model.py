"""The whole model: TorchRec's tables and a MaskNet on top, one definition for training and scoring."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from masknet.config import MaskNetConfig
from masknet.networks import build_network

INIT_STD = 0.01


@dataclass(frozen=True, kw_only=True)
class Table:
    """A field's embedding table: its rows and how several ids of a row are pooled ('sum' or 'mean')."""

    name: str
    rows: int
    pooling: Literal["sum", "mean"]


class MaskNet(nn.Module):
    """Ids → embeddings [B, F, d] → logits [B].

    Args:
        config: the network's shape.
        tables: one per field; their order is the order of F.
        device: where the tables are made; "meta" leaves that to TorchRec's sharding.
    """

    def __init__(self, config: MaskNetConfig, tables: tuple[Table, ...], *, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.field_names = [table.name for table in tables]
        self._dim = config.embedding_dim
        self.embeddings = EmbeddingBagCollection(
            tables=[_bag_config(index, table, config.embedding_dim) for index, table in enumerate(tables)],
            device=torch.device(device),
        )
        self.network = build_network(config, len(tables))

    def forward(self, ids: KeyedJaggedTensor) -> torch.Tensor:
        """Logits [B] in fp32."""
        pooled = self.embeddings(ids)
        # By name: the order of the tensor's own values follows the sharding plan, not the fields.
        emb_BD = KeyedTensor.regroup([pooled], [self.field_names])[0]
        logit_B: torch.Tensor = self.network(emb_BD.view(-1, len(self.field_names), self._dim))
        return logit_B.float()


def table_key(index: int) -> str:
    """What TorchRec calls a field's table, as a module; the field's name may be no name for one ("type", "a.b")."""
    return f"t{index:03d}"


def _bag_config(index: int, table: Table, dim: int) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=table_key(index),
        embedding_dim=dim,
        num_embeddings=table.rows,
        feature_names=[table.name],
        pooling=PoolingType.MEAN if table.pooling == "mean" else PoolingType.SUM,
    )


def initial_rows(table: Table, dim: int, seed: int) -> torch.Tensor:
    """A table's initial weights [rows, dim], N(0, 0.01²), by its name, shape and the seed, whatever its sharding.

    The scale matters beside eps: LN_EMB brings rows of standard deviation s to s / √(s² + eps), with eps 1e-5 to 0.95.
    """
    digest = hashlib.sha256(f"{seed}/{table.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # seeds have 63 bits
    return torch.empty(table.rows, dim).normal_(0.0, INIT_STD, generator=generator)
