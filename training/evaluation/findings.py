"""What an evaluation holds: scores and metrics of the same rows, and what was found out about them.

Legend: N rows, K bins.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from serving.bundle import Bundle
from training.evaluation.results import Comparison, Cost, Drift, Estimate, FieldImportance, MaskStatistics, Slice

FloatN = npt.NDArray[np.floating]
Metrics = Mapping[str, float | None]
MODEL = "MaskNet"  # what the model is called beside baselines


@dataclass(frozen=True)
class Subject:
    """A model under evaluation: what the report calls it, and the evaluated rows in its own encoding."""

    name: str
    bundle: Bundle
    table: pa.Table


@dataclass(frozen=True)
class Resampled:
    """How the intervals were found: how many draws, of groups by this column, or of single rows where it is None."""

    replicates: int
    group: str | None


@dataclass(frozen=True)
class Findings:
    """All that takes longer than metrics; what could not be found out is empty, or None.

    Attributes:
        estimates: metrics with 95 % intervals, by scorer.
        comparisons: of the model with every other scorer, the rival first.
        slices: parts of the rows, with the difference to the rival where there is one.
        importance: by model.
        masks: by model; those without instance-guided masks are left out.
        drift: of the model; None where the training split is not at hand.
        cost: by model, a row for each size of request.
    """

    resampled: Resampled
    estimates: dict[str, dict[str, Estimate]]
    comparisons: list[Comparison]
    slices: list[Slice] = field(default_factory=list)
    importance: dict[str, list[FieldImportance]] = field(default_factory=dict)
    masks: dict[str, MaskStatistics] = field(default_factory=dict)
    drift: Drift | None = None
    cost: dict[str, list[Cost]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Scores of the same rows: by the model first, by its rival if there is one, and by each baseline.

    Attributes:
        subjects: the model, and the rival if there is one.
        source: where the rows come from, in words.
        group_N: of each row, None for a row without; None where the schema has no group.
        uncalibrated: the scores before calibration, of the models that are calibrated.
        metrics: by scorer, the keys of `features.metrics.score_metrics`.
        metrics_before: the same of the scores before calibration.
        bounds: how far the exact "auc" and "pr_auc" can be, by scorer; {} where the metrics are exact.
        by_familiarity: AUC of groups known and new to the model.
        sampled: whether negatives are missing among the rows, which the scores do not know: they are for all rows.
        notes: what is to be known of how it was done, sentence by sentence.
    """

    subjects: tuple[Subject, ...]
    source: str
    label_N: FloatN
    group_N: npt.NDArray[Any] | None
    scores: dict[str, FloatN]
    uncalibrated: dict[str, FloatN]
    metrics: dict[str, dict[str, float | None]]
    metrics_before: dict[str, dict[str, float | None]]
    by_familiarity: dict[str, dict[str, Any]]
    bounds: dict[str, dict[str, float]] = field(default_factory=dict)
    sampled: bool = False
    notes: tuple[str, ...] = ()
    findings: Findings | None = None

    @property
    def rankings(self) -> dict[str, FloatN]:
        """What orders the rows, by scorer: a model's scores before calibration."""
        return self.scores | self.uncalibrated

    @property
    def bundle(self) -> Bundle:
        """The model's."""
        return self.subjects[0].bundle

    @property
    def model(self) -> str:
        """The name that the model's scores have here."""
        return self.subjects[0].name

    @property
    def rival(self) -> str | None:
        """The name of the model that it is compared with."""
        return self.subjects[1].name if len(self.subjects) > 1 else None

    @property
    def rows(self) -> int:
        return len(self.label_N)

    @property
    def clicks(self) -> int:
        return int(self.label_N.sum())
