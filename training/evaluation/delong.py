"""The interval of an AUC and the test of a difference of two, by DeLong's standard errors (`features.metrics_delong`).

Rows have to be independent: where they come in groups, rows of a group win and lose together, and p is smaller than it
should be.

Legend: N rows.
"""

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from features.metrics_delong import auc_with_error
from training.evaluation.intervals import LEVEL, verdict
from training.evaluation.results import Difference, Estimate

FloatN = npt.NDArray[np.floating]


def delong_auc(label_N: FloatN, score_N: FloatN) -> Estimate:
    """AUC and its 95 % interval; None unless both classes occur, the interval unless both do five times."""
    value, error = auc_with_error(label_N, score_N)
    return Estimate(value, *_interval(value, error))


def delong_difference(label_N: FloatN, score_N: FloatN, other_N: FloatN) -> Difference:
    """AUC of the first scores minus that of the others, paired by row.

    p and the interval are None where AUC is, with fewer than five rows of a class, and where the AUCs differ without
    any spread (as a perfect model's and a constant's).
    """
    value, error = auc_with_error(label_N, score_N, other_N)
    if value is None or error is None or (error == 0 and value != 0):
        return Difference(value, None, None, None, "DeLong", "not told apart")
    p = float(2 * norm.sf(abs(value) / error)) if error else 1.0
    return Difference(value, *_interval(value, error), p, "DeLong", verdict("auc", value, p))


def _interval(value: float | None, error: float | None) -> tuple[float | None, float | None]:
    if value is None or error is None:
        return None, None
    half = float(norm.ppf(1 - LEVEL / 2)) * error
    return value - half, value + half
