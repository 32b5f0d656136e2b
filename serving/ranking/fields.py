"""Some of a model's fields, from ids and values to embeddings.

Legend: N rows, F of the model's fields, S of them with one id a row, V with values, d embedding width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from features.online import Encoded, Ids
from features.pipeline import FeaturePipeline
from masknet.model import MaskNet
from serving.ranking.tables import Place, Tables


class Fields:
    """Embeddings of the given fields beside each other, as the model's own `embed` gives them.

    Args:
        names: the fields, in the order of the output.
        pipeline: which encodes them.
        model: whose value embeddings are read.
        tables: the model's.
    """

    def __init__(self, names: Sequence[str], pipeline: FeaturePipeline, model: MaskNet, tables: Tables) -> None:
        self.names, self._tables = tuple(names), tables
        lists = {field.name for field in pipeline.fields if field.is_list}
        places = {name: place for place, name in enumerate(names)}
        with_ids = [(name, tables.places[name]) for name in names if name in tables.places]
        self._singles = [(name, place.offset) for name, place in with_ids if name not in lists]
        self._lists = [(name, place, places[name]) for name, place in with_ids if name in lists]
        self._values = [name for name in names if name not in tables.places]
        self._single_places = _index([places[name] for name, _ in self._singles])
        self._value_places = _index([places[name] for name in self._values])
        self._scale, self._bias, self._missing = _value_weights(model, self._values)

    def embed(self, encoded: Encoded, rows: int) -> torch.Tensor:
        """Embeddings [N, F · d] in fp32 of N rows; what is encoded once stands for all of them."""
        dim, count = self._tables.dim, len(self.names)
        if self._singles:
            place_NS = np.empty((rows, len(self._singles)), np.int64)
            for column, (name, offset) in enumerate(self._singles):
                np.add(encoded.ids[name].ids_K, offset, out=place_NS[:, column])
            single = self._tables.rows(torch.from_numpy(place_NS.reshape(-1)))
            if len(self._singles) == count:
                return single.reshape(rows, count * dim)
        emb_NFd = torch.empty(rows, count, dim)
        if self._singles:
            emb_NFd[:, self._single_places] = single.view(rows, -1, dim)
        for name, place, at in self._lists:
            emb_NFd[:, at] = self._pooled(encoded.ids[name], place)
        if self._values:
            emb_NFd[:, self._value_places] = self._embedded_values(encoded, rows)
        return emb_NFd.view(rows, count * dim)

    def _pooled(self, ids: Ids, place: Place) -> torch.Tensor:
        """Pooled embeddings [N, d] of lists; [1, d] where one list stands for all rows."""
        assert ids.lengths_N is not None
        items_Ld = self._tables.rows(torch.from_numpy(ids.ids_K.astype(np.int64) + place.offset))
        starts_N = np.cumsum(ids.lengths_N) - ids.lengths_N
        return embedding_bag(
            torch.arange(len(items_Ld)), items_Ld, torch.from_numpy(starts_N), mode="mean" if place.mean else "sum"
        )

    def _embedded_values(self, encoded: Encoded, rows: int) -> torch.Tensor:
        value_NV = np.empty((rows, len(self._values)), np.float32)
        for column, name in enumerate(self._values):
            value_NV[:, column] = encoded.values[name]
        missing_NV = np.isnan(value_NV)
        value_NV[missing_NV] = 0.0
        emb_NVd = torch.addcmul(self._bias, torch.from_numpy(value_NV).unsqueeze(-1), self._scale)
        return emb_NVd.addcmul_(torch.from_numpy(missing_NV).unsqueeze(-1).to(torch.float32), self._missing)


def _index(places: list[int]) -> slice | torch.Tensor:
    """Places for indexing; a slice where they follow each other, which is written ten times as fast."""
    if places and places == list(range(places[0], places[-1] + 1)):
        return slice(places[0], places[-1] + 1)
    return torch.tensor(places, dtype=torch.int64)


def _value_weights(model: MaskNet, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """v, b and u [V, d] of the fields with values, in the given order."""
    if model.values is None:
        return torch.empty(0), torch.empty(0), torch.empty(0)
    own = torch.tensor([model.values.names.index(name) for name in names], dtype=torch.int64)
    weights = (model.values.scale, model.values.bias, model.values.missing)
    scale, bias, missing = (weight.detach()[own] for weight in weights)
    return scale, bias, missing
