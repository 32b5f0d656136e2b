"""What an evaluation finds, as plain values.

Legend: N rows, K bins, B blocks, F fields.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatN = npt.NDArray[np.floating]
Verdict = Literal["better", "worse", "not told apart"]
SliceKind = Literal["value", "unknown", "missing", "activity", "time"]


@dataclass(frozen=True)
class Estimate:
    """A metric and the 95 % interval that chance leaves it; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """A metric of one model minus that of another on the same rows, its 95 % interval, and p of no difference.

    The verdict speaks of the first model: better or worse if p is below .05, by the metric's own direction.
    """

    value: float | None
    low: float | None
    high: float | None
    p: float | None
    test: Literal["DeLong", "bootstrap", "t"]
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """Two models on the same rows, metric by metric, and what a person should take from it in a sentence.

    `delong` is AUC's difference by DeLong's test, which takes rows as independent: where rows come in groups its p is
    smaller than it should be, and the verdict is the bootstrap's.
    """

    first: str
    second: str
    differences: dict[str, Difference]
    sentence: str
    delong: Difference | None = None


@dataclass(frozen=True)
class Slice:
    """A part of the rows, its metrics by model, and, of two models, the difference first − second.

    Attributes:
        field: what it is a slice by: a field's name, or "time".
        kind: what `name` is of it.
        name: as a person reads it: "gender = F", "user_id: cold (not seen in training)".
        metrics: by model, then by metric ("auc", "logloss", "calibration"); None where not defined.
        logloss: Δ log loss, of two models.
        p_corrected: of that difference, corrected for the number of slices tested (Holm).
        verdict: of that difference; None where it is not tested, of too few groups.
    """

    field: str
    kind: SliceKind
    name: str
    rows: int
    clicks: int
    metrics: dict[str, dict[str, float | None]]
    logloss: Difference | None = None
    p_corrected: float | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True)
class FieldImportance:
    """What a model loses when a field's values are shuffled over the rows: means over repeats, and their spread."""

    field: str
    auc_drop: float | None
    auc_drop_sd: float | None
    logloss_rise: float
    logloss_rise_sd: float


@dataclass(frozen=True)
class MaskStatistics:
    """Instance-guided masks over rows: per block and field the mean gate, and its deviation between rows.

    Attributes:
        fields: the names of F.
        mean_BF: mean over rows and the field's width.
        deviation_BF: standard deviation over rows, averaged over the field's width.
        hidden: of blocks that mask hidden units: (block, mean, deviation).
    """

    fields: list[str]
    mean_BF: npt.NDArray[np.floating]
    deviation_BF: npt.NDArray[np.floating]
    hidden: list[tuple[int, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Drift:
    """Population stability index per field between the training split and the evaluated rows, and of the score."""

    of: str  # "train → test"
    fields: dict[str, float | None]
    score: float | None


@dataclass(frozen=True)
class Cost:
    """What serving the folded model takes: milliseconds per request of `candidates` rows on this machine, and bytes."""

    candidates: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    network_parameters: int
    table_parameters: int
    bundle_bytes: int
    device: str
