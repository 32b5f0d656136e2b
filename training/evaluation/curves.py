"""Curves and counts of scores, which the report draws and metrics.json holds.

Legend: N rows, K bins, P points of a curve.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_curve

from features.metrics import reliability
from training.evaluation.findings import Evaluation

FloatN = npt.NDArray[np.floating]
IntK = npt.NDArray[np.integer]
BEFORE = "{}, before calibration"
_POINTS = 300  # of a curve: more cannot be seen
_BINS = 40  # of a histogram


@dataclass(frozen=True)
class Reliability:
    """Mean score, mean label and rows of bins of equally many rows, each [K]."""

    predicted: FloatN
    observed: FloatN
    rows: IntK


@dataclass(frozen=True)
class Histogram:
    """Rows without and with a click in bins of equal width; edges are [K + 1]."""

    edges: FloatN
    others: IntK
    clicks: IntK


@dataclass(frozen=True)
class Curves:
    """By scorer; models that are calibrated are there twice in `reliability`, as they were before too.

    Attributes:
        roc: false and true positive rates [P]; without scorers where there is one class only.
        reliability: of all whose scores differ.
        histogram: of models.
    """

    roc: dict[str, tuple[FloatN, FloatN]]
    reliability: dict[str, Reliability]
    histogram: dict[str, Histogram]


def curves_of(evaluation: Evaluation) -> Curves:
    """The curves of an evaluation's scores; scorers that say the same of every row have none."""
    label_N = evaluation.label_N
    both = bool(label_N.min() != label_N.max())
    informative = {name: score_N for name, score_N in evaluation.scores.items() if score_N.min() != score_N.max()}
    reliabilities: dict[str, Reliability] = {}
    for name, score_N in informative.items():
        reliabilities[name] = Reliability(*reliability(label_N, score_N))
        if name in evaluation.uncalibrated:
            before_N = evaluation.uncalibrated[name]
            reliabilities[BEFORE.format(name)] = Reliability(*reliability(label_N, before_N))
    return Curves(
        roc={name: _roc(label_N, evaluation.rankings[name]) for name in informative} if both else {},
        reliability=reliabilities,
        histogram={
            subject.name: _histogram(label_N, evaluation.scores[subject.name]) for subject in evaluation.subjects
        },
    )


def _roc(label_N: FloatN, score_N: FloatN) -> tuple[FloatN, FloatN]:
    false_rate, true_rate, _ = roc_curve(label_N, score_N)
    along = false_rate + true_rate  # grows along the curve, whichever way it goes
    kept = np.unique(np.searchsorted(along, np.linspace(0.0, 2.0, _POINTS)).clip(max=len(along) - 1))
    return false_rate[kept], true_rate[kept]


def _histogram(label_N: FloatN, score_N: FloatN) -> Histogram:
    """Over 0 to 1, or to the least tenth that holds all scores where those are small."""
    edges = np.linspace(0.0, np.ceil(10 * float(score_N.max())) / 10 or 0.1, _BINS + 1)
    others, _ = np.histogram(score_N[label_N == 0], edges)
    clicks, _ = np.histogram(score_N[label_N == 1], edges)
    return Histogram(edges, others, clicks)
