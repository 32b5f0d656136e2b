"""The whole model: TorchRec's tables, embeddings of values, and a MaskNet on top; one definition to train and score."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from masknet.config import MaskNetConfig
from masknet.networks import build_network
from masknet.values import INIT_STD, ValueEmbedding, ValueField

_VALUES = "values."  # of the value embeddings' weights, beside the network's
_TABLES = "embeddings.embedding_bags."
_NETWORK = "network."


@dataclass(frozen=True, kw_only=True)
class Table:
    """An embedding table: the fields that share it, its rows, and how several ids of a row are pooled."""

    name: str
    features: tuple[str, ...]
    rows: int
    pooling: Literal["sum", "mean"]


class MaskNet(nn.Module):
    """Ids and values → embeddings [B, F, d] → logits [B].

    Args:
        config: the network's shape.
        tables: every field with ids is a feature of one of them.
        fields: the order of F: fields with ids by name, fields with values as `ValueField`.
        device: where the tables are made; "meta" leaves that to TorchRec's sharding.

    Raises:
        ValueError: no field has ids, the configuration leaves a layer without units, or it names an unknown table.
    """

    def __init__(
        self,
        config: MaskNetConfig,
        tables: tuple[Table, ...],
        fields: tuple[str | ValueField, ...],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if not tables:
            raise ValueError("no field has ids: a MaskNet needs one embedding table at least")
        values = [field for field in fields if isinstance(field, ValueField)]
        self.field_names = [field.name if isinstance(field, ValueField) else field for field in fields]
        self.table_names = [table.name for table in tables]
        for name in config.pooling:
            if name not in self.table_names:
                raise ValueError(f"pooling: {name} is no table; there are {', '.join(self.table_names)}")
        self._dim = config.embedding_dim
        self.embeddings = EmbeddingBagCollection(
            tables=[_bag_config(index, table, config) for index, table in enumerate(tables)],
            device=torch.device(device),
        )
        raw = [i for i, field in enumerate(fields) if isinstance(field, ValueField) and not field.normalize]
        self.network = build_network(config, len(fields), tuple(raw))
        self.values = _value_embedding(values, config)

    def forward(self, ids: KeyedJaggedTensor, values_BV: torch.Tensor, missing_BV: torch.Tensor) -> torch.Tensor:
        """Logits [B] in fp32.

        Args:
            ids: the ids of the fields that have some, under their names.
            values_BV: the V value fields in their order, 0 where missing.
            missing_BV: 1 where a value is missing, else 0.
        """
        logit_B: torch.Tensor = self.network(self.embed(ids, values_BV, missing_BV))
        return logit_B.float()

    def embed(self, ids: KeyedJaggedTensor, values_BV: torch.Tensor, missing_BV: torch.Tensor) -> torch.Tensor:
        """What the network reads of the same arguments: embeddings [B, F, d]."""
        embedded = [self.embeddings(ids)]
        if self.values is not None:
            embedded.append(self.values(values_BV, missing_BV))
        emb_BD = _in_order(embedded, self.field_names)
        return emb_BD.view(-1, len(self.field_names), self._dim)

    def dense_state(self) -> dict[str, torch.Tensor]:
        """Copies, on the CPU, of all weights but the tables': the network's, and the value embeddings' as values.*."""
        state = dict(self.network.state_dict())
        if self.values is not None:
            state |= self.values.state_dict(prefix=_VALUES)
        return {name: weight.detach().cpu().clone() for name, weight in state.items()}

    def load_weights(self, dense: Mapping[str, torch.Tensor], tables: Sequence[torch.Tensor]) -> None:
        """Take over what `dense_state` gave, and whole tables [rows, d]; RuntimeError where they do not fit."""
        self._load(dense, {_table_weight(i): weight for i, weight in enumerate(tables)})

    def load_dense(self, dense: Mapping[str, torch.Tensor]) -> None:
        """Take over what `dense_state` gave, and leave the tables; RuntimeError where it does not fit."""
        self._load(dense, {name: weight for name, weight in self.state_dict().items() if name.startswith(_TABLES)})

    def _load(self, dense: Mapping[str, torch.Tensor], tables: Mapping[str, torch.Tensor]) -> None:
        own = {name if name.startswith(_VALUES) else f"{_NETWORK}{name}": weight for name, weight in dense.items()}
        self.load_state_dict({**own, **tables})


@torch.fx.wrap  # which TorchRec's pipeline, that traces the model, is not to look into
def _in_order(embedded: list[KeyedTensor], names: list[str]) -> torch.Tensor:
    """Embeddings by the names of fields: the order of the tables' own output follows the sharding plan."""
    if len(embedded) == 1 and embedded[0].keys() == names:
        return embedded[0].values()  # as often as not; regrouping copies everything, and its gradient again
    ordered: torch.Tensor = KeyedTensor.regroup(embedded, [names])[0]
    return ordered


def split_weights(
    state: Mapping[str, torch.Tensor], num_tables: int
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Of a whole model's state, what `load_weights` takes: all weights but the tables', and the tables in order."""
    rest = dict(state)
    tables = [rest.pop(_table_weight(index)) for index in range(num_tables)]
    return {name.removeprefix(_NETWORK): weight for name, weight in rest.items()}, tables


def _table_weight(index: int) -> str:
    return f"{_TABLES}{table_key(index)}.weight"


def table_key(index: int) -> str:
    """What TorchRec calls a table, as a module; a field's name may be no name for one ("type", "a.b")."""
    return f"t{index:03d}"


def _bag_config(index: int, table: Table, config: MaskNetConfig) -> EmbeddingBagConfig:
    pooling = config.pooling.get(table.name, table.pooling)
    return EmbeddingBagConfig(
        name=table_key(index),
        embedding_dim=config.embedding_dim,
        num_embeddings=table.rows,
        feature_names=list(table.features),
        pooling=PoolingType.MEAN if pooling == "mean" else PoolingType.SUM,
    )


def _value_embedding(fields: list[ValueField], config: MaskNetConfig) -> ValueEmbedding | None:
    names = [field.name for field in fields]
    return ValueEmbedding(names, config.embedding_dim, config.embedding_init) if names else None


def initial_rows(table: Table, dim: int, seed: int, std: float = INIT_STD) -> torch.Tensor:
    """A table's initial weights [rows, dim], N(0, std²), by its name, shape and the seed, whatever its sharding.

    The scale matters beside eps: LN_EMB brings rows of standard deviation s to s / √(s² + eps), with s = 0.01 and eps
    1e-5 to 0.95.
    """
    digest = hashlib.sha256(f"{seed}/{table.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # seeds have 63 bits
    return torch.empty(table.rows, dim).normal_(0.0, std, generator=generator)
