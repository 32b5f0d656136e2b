"""The one scorer: every score that is published, online or offline, comes from here."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from features.batches import EncodedRows
from features.columns import Rows
from features.id_maps import IdMap, with_rows
from features.pipeline import FeaturePipeline
from masknet.folding import fold
from masknet.model import MaskNet

ScoreN = npt.NDArray[np.float32]
CHUNK = 2048  # rows at once: bounds memory, and what a layer leaves fits the cache; of no consequence but for rounding


class Scorer:
    """Probability of a click in fp32, for raw or encoded rows: σ(logit − log(1 / rate)).

    Args:
        pipeline: what encodes the rows.
        model: trained on rows so encoded; its network is folded as it is now.
        sampling_rate: the kept share of negatives among those rows; 1 where none were dropped.
        id_maps: the rows of managed fields' ids, by the fields that own the tables.
    """

    def __init__(
        self,
        pipeline: FeaturePipeline,
        model: MaskNet,
        sampling_rate: float,
        id_maps: Mapping[str, IdMap] = MappingProxyType({}),
    ) -> None:
        assert set(pipeline.managed.values()) == id_maps.keys()  # or there are ids without rows
        self.pipeline, self.id_maps = pipeline, dict(id_maps)
        self.model = model.eval()
        self._network = fold(model.network)
        self._no_context = torch.empty(1, 0)
        self._shift = math.log(sampling_rate)

    def score(self, rows: Rows) -> ScoreN:
        """Scores [N] of raw rows; InputError names the field and row that cannot be encoded."""
        return self.score_encoded(self.pipeline.encode(rows))

    def score_encoded(self, encoded: pa.Table) -> ScoreN:
        """Scores [N] of rows that this scorer's pipeline has encoded; training-only fields count as their defaults."""
        served = with_rows(self.pipeline.as_served(encoded), self.pipeline, self.id_maps)
        rows = EncodedRows.of(served, self.pipeline.layout)
        score_N = np.empty(rows.num_rows, np.float32)
        with torch.inference_mode():
            for start in range(0, rows.num_rows, CHUNK):
                row_B = np.arange(start, min(start + CHUNK, rows.num_rows))
                emb_BD = self.model.embed(*rows.gather(row_B)).flatten(1)
                logit_B = self._network(self._no_context, emb_BD).float()
                score_N[row_B] = (logit_B + self._shift).sigmoid().numpy()
        return score_N
