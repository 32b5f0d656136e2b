"""The whole model for inference: a folded network on tables that hold, beside each row, what LN_EMB makes of it.

Legend: B rows, F fields, S of them with one id in every row, L the others, d embedding width.
"""

from collections.abc import Collection, Sequence

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from masknet.folding import fold
from masknet.folding.blocks import EmbeddingNorm, Hidden
from masknet.model import MaskNet

_CHUNK = 65536  # rows of a table that are normalized at once: bounds memory


class ServingModel(nn.Module):
    """Ids and values → logits [B], as the trained `MaskNet` gives them but for rounding.

    Of a field that has exactly one id in every row, LN_EMB's output depends on its table's row alone. The tables of all
    such fields become one, [rows, 2d], an embedding on the left and its normalized form on the right, so that one
    lookup fetches both; it takes twice the memory. Fields with lists, with values, and those that share a table, are
    looked up and normalized as in training; so are all fields where LN_EMB looks at the whole row (`conditional`).

    Args:
        model: a trained model; its value embeddings and the tables of the other fields are shared, not copied.
        single: the fields that have exactly one id in every row.

    Raises:
        ValueError: `single` names no field with ids.
    """

    rows_R2d: torch.Tensor
    offset_S1: torch.Tensor
    size_S1: torch.Tensor
    order_F: torch.Tensor

    def __init__(self, model: MaskNet, single: Collection[str]) -> None:
        super().__init__()
        configs = model.embeddings.embedding_bag_configs()
        unknown = set(single) - {name for config in configs for name in config.feature_names}
        if unknown:
            raise ValueError(f"single: there are no ids of {', '.join(sorted(unknown))}")
        self.network = fold(model.network)
        norm = self.network.candidate_norm
        self.by_row = self.network.context_norm is not None and not norm.norm.trivial
        chosen = [config for config in configs if self.by_row and _is_of_one(config, single)]
        others = [config for config in configs if config not in chosen]
        places = {name: place for place, name in enumerate(model.field_names)}
        chosen.sort(key=lambda config: places[config.feature_names[0]])
        bags = model.embeddings.embedding_bags
        self.single = [config.feature_names[0] for config in chosen]
        self.others = [name for name in model.field_names if name not in self.single]
        self.embeddings = _collection(others, bags) if others else None
        self.values = model.values
        self.other_norm = norm.select([places[name] for name in self.others]) if self.by_row else None
        tables = [
            _beside(bags[config.name].weight.detach(), norm.select([places[name]]))
            for config, name in zip(chosen, self.single, strict=True)
        ]
        sizes = [len(table) for table in tables]
        order = [*self.single, *self.others]
        dim = model.embeddings.embedding_bag_configs()[0].embedding_dim
        self.register_buffer("rows_R2d", torch.cat(tables) if tables else torch.empty(0, 2 * dim))
        self.register_buffer("offset_S1", torch.tensor([0, *sizes]).cumsum(0)[: len(sizes), None])
        self.register_buffer("size_S1", torch.tensor(sizes, dtype=torch.int64)[:, None])
        self.register_buffer("order_F", torch.tensor([order.index(name) for name in model.field_names]))

    @torch.no_grad()
    def forward(self, ids: KeyedJaggedTensor, values_BV: torch.Tensor, missing_BV: torch.Tensor) -> torch.Tensor:
        """Logits [B] in fp32; arguments as `MaskNet.forward` takes them.

        Raises:
            ValueError: a field of `single` has not exactly one id in every row, or an id that its table has no row for.
        """
        both_BS2d = self._looked_up(ids)
        raw_BFd, normed_BFd = both_BS2d.chunk(2, dim=2)
        if self.others:
            other_BLd = self._embedded(ids, values_BV, missing_BV)
            raw_BFd = torch.cat([raw_BFd, other_BLd], 1).index_select(1, self.order_F)
            if self.other_norm is not None:
                normed_BLd = self.other_norm(other_BLd.flatten(1), Hidden()).view(other_BLd.shape)
                normed_BFd = torch.cat([normed_BFd, normed_BLd], 1).index_select(1, self.order_F)
        normed_BD = normed_BFd.flatten(1) if self.by_row else None
        logit_B: torch.Tensor = self.network(raw_BFd.new_empty(1, 0), raw_BFd.flatten(1), normed_BD)
        return logit_B.float()

    def _looked_up(self, ids: KeyedJaggedTensor) -> torch.Tensor:
        """Rows [B, S, 2d] of the fields with one id."""
        rows = ids.stride()
        if not self.single:
            return self.rows_R2d.new_empty(rows, 0, self.rows_R2d.shape[1])
        given = [ids[name] for name in self.single]
        for name, one in zip(self.single, given, strict=True):
            if len(one.values()) != rows or not bool((one.lengths() == 1).all()):
                raise ValueError(f"field {name} must have one id in each of the {rows} rows")
        id_SB = torch.stack([one.values() for one in given])
        if bool(((id_SB < 0) | (id_SB >= self.size_S1)).any()):
            raise ValueError(f"an id of {', '.join(self.single)} is not in its table")
        place_SB = id_SB + self.offset_S1
        return self.rows_R2d.index_select(0, place_SB.t().flatten()).view(
            rows, len(self.single), self.rows_R2d.shape[1]
        )

    def _embedded(self, ids: KeyedJaggedTensor, values_BV: torch.Tensor, missing_BV: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, L, d] of the other fields."""
        embedded = []
        if self.embeddings is not None:
            names = [name for name in ids.keys() if name in self.others]  # noqa: SIM118 (not a dictionary)
            embedded.append(self.embeddings(ids.permute([ids.keys().index(name) for name in names])))
        if self.values is not None:
            embedded.append(self.values(values_BV, missing_BV))
        return KeyedTensor.regroup(embedded, [self.others])[0].view(
            ids.stride(), len(self.others), self.rows_R2d.shape[1] // 2
        )


def _is_of_one(config: EmbeddingBagConfig, single: Collection[str]) -> bool:
    return len(config.feature_names) == 1 and config.feature_names[0] in single


def _collection(configs: Sequence[EmbeddingBagConfig], bags: nn.ModuleDict) -> EmbeddingBagCollection:
    """A collection of some of the tables, with the weights that they have."""
    collection = EmbeddingBagCollection(tables=list(configs), device=torch.device("meta"))
    for config in configs:
        collection.embedding_bags[config.name] = bags[config.name]
    return collection


@torch.no_grad()
def _beside(weight_Rd: torch.Tensor, norm: EmbeddingNorm) -> torch.Tensor:
    """A table's rows with what LN_EMB makes of them, [R, 2d]."""
    both_R2d = torch.cat([weight_Rd, torch.empty_like(weight_Rd)], 1)
    dim = weight_Rd.shape[1]
    for rows in torch.split(both_R2d, _CHUNK):
        rows[:, dim:] = norm(rows[:, :dim].contiguous(), Hidden())
    return both_R2d
