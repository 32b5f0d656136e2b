"""The one scorer: every score that is published, online or offline, comes from here."""

import copy
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import torch

from features.batches import EncodedRows
from features.columns import Rows
from features.id_maps import IdMap, with_rows
from features.pipeline import FeaturePipeline
from masknet.folding import fold
from masknet.model import MaskNet
from serving.backends.base import Network
from serving.calibration import UNCALIBRATED, Calibration, ScoreN

CHUNK = 2048  # rows at once: bounds memory, and what a layer leaves fits the cache; of no consequence but for rounding


class Scorer:
    """Probability of a click in fp32: calibrate(mean over members of σ(logit − log(1 / rate))), of raw or encoded rows.

    Args:
        pipeline: what encodes the rows.
        models: the members, trained on rows so encoded; their networks are folded as they are now.
        sampling_rate: the kept share of negatives among those rows; 1 where none were dropped.
        id_maps: the rows of managed fields' ids, by the fields that own the tables.
        calibration: the last step, fitted on what `uncalibrated` gives.
    """

    def __init__(
        self,
        pipeline: FeaturePipeline,
        models: Sequence[MaskNet],
        sampling_rate: float,
        id_maps: Mapping[str, IdMap] = MappingProxyType({}),
        calibration: Calibration = UNCALIBRATED,
    ) -> None:
        assert set(pipeline.managed.values()) == id_maps.keys()  # or there are ids without rows
        self.pipeline, self.id_maps = pipeline, dict(id_maps)
        self.models = tuple(model.eval() for model in models)
        self.sampling_rate, self.calibration = sampling_rate, calibration
        self.networks: tuple[Network, ...] = tuple(fold(model.network) for model in self.models)
        self._no_context = torch.empty(1, 0)
        self._shift = math.log(sampling_rate)

    def with_calibration(self, calibration: Calibration) -> "Scorer":
        """The same members with another last step."""
        other = copy.copy(self)
        other.calibration = calibration
        return other

    def with_networks(self, networks: Sequence[Network]) -> "Scorer":
        """The same members with something else for their folded networks: (context [1, 0], embeddings [B, D]) → [B]."""
        other = copy.copy(self)
        other.networks = tuple(networks)
        return other

    def score(self, rows: Rows) -> ScoreN:
        """Scores [N] of raw rows; InputError names the field and row that cannot be encoded, or the row that cannot be
        scored (Unscorable)."""
        return self.score_encoded(self.pipeline.encode(rows))

    def score_encoded(self, encoded: pa.Table) -> ScoreN:
        """Scores [N] of rows that this scorer's pipeline has encoded; training-only fields count as their defaults."""
        return self.calibration.apply(self.uncalibrated(encoded))

    def ranked_and_served(self, encoded: pa.Table) -> tuple[ScoreN, ScoreN]:
        """Scores [N] as `uncalibrated`, which rank, and as `score_encoded`, from one pass over the rows."""
        ranking_N = self.uncalibrated(encoded)
        return ranking_N, self.calibration.apply(ranking_N)

    def uncalibrated(self, encoded: pa.Table) -> ScoreN:
        """Scores [N] before the calibration, corrected for the sampling rate: what rankings order by."""
        served = with_rows(self.pipeline.as_served(encoded), self.pipeline, self.id_maps)
        rows = EncodedRows.of(served, self.pipeline.layout)
        score_N = np.empty(rows.num_rows, np.float32)
        with torch.inference_mode():
            for start in range(0, rows.num_rows, CHUNK):
                row_B = np.arange(start, min(start + CHUNK, rows.num_rows))
                score_N[row_B] = self._mean(rows, row_B).numpy()
        return score_N

    def _mean(self, rows: EncodedRows, row_B: np.ndarray) -> torch.Tensor:
        inputs, score_MB = rows.gather(row_B), []
        for model, network in zip(self.models, self.networks, strict=True):
            emb_BD = model.embed(*inputs).flatten(1)
            score_MB.append((network(self._no_context, emb_BD).float() + self._shift).sigmoid())
        return torch.stack(score_MB).mean(0)
