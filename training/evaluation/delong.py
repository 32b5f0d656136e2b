"""AUC's variance and the test of a difference of two AUCs (DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988).

An AUC is a mean over clicks of the share of other rows that score below, and over other rows of the share of clicks
that score above. The spreads of both shares make its variance, and those of the shares' differences between two models
the variance of the AUCs' difference. The shares come from one sort (Sun and Xu, IEEE Signal Processing Letters 21,
2014). Rows have to be independent: where they come in groups, rows of a group win and lose together, and p is smaller
than it should be.

Legend: N rows, of which P clicks and Q others.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from features.metrics_input import clicks_of, require_numbers
from training.evaluation.intervals import LEVEL, verdict
from training.evaluation.results import Difference, Estimate

MIN_EACH = 5  # rows of a class; the spread of fewer is not known well enough for a normal distribution
FloatN = npt.NDArray[np.floating]
BoolN = npt.NDArray[np.bool_]


def pairs_won(click_N: BoolN, score_N: FloatN) -> npt.NDArray[np.float64]:
    """For a click the others that score below it, for another row the clicks that score above it; ties are half."""
    _, place_N = np.unique(score_N, return_inverse=True)
    clicks_K = np.bincount(place_N, click_N)
    others_K = np.bincount(place_N) - clicks_K
    below_K = np.cumsum(others_K) - others_K / 2
    above_K = clicks_K.sum() - np.cumsum(clicks_K) + clicks_K / 2
    return np.where(click_N, below_K[place_N], above_K[place_N])


def delong_auc(label_N: FloatN, score_N: FloatN) -> Estimate:
    """AUC and its 95 % interval; None unless both classes occur, the interval unless both do five times."""
    value, error = _mean_and_error(label_N, (score_N,))
    return Estimate(value, *_interval(value, error))


def delong_difference(label_N: FloatN, score_N: FloatN, other_N: FloatN) -> Difference:
    """AUC of the first scores minus that of the others, paired by row.

    p and the interval are None where AUC is, with fewer than five rows of a class, and where the AUCs differ without
    any spread (as a perfect model's and a constant's).
    """
    value, error = _mean_and_error(label_N, (score_N, other_N))
    if value is None or error is None or (error == 0 and value != 0):
        return Difference(value, None, None, None, "DeLong", "not told apart")
    p = float(2 * norm.sf(abs(value) / error)) if error else 1.0
    return Difference(value, *_interval(value, error), p, "DeLong", verdict("auc", value, p))


def _mean_and_error(label_N: FloatN, scores: tuple[FloatN, ...]) -> tuple[float | None, float | None]:
    """AUC, or the first minus the second, and its standard error."""
    click_N = clicks_of(label_N, scores[0])
    clicks, others = int(click_N.sum()), int((~click_N).sum())
    if not clicks or not others:
        return None, None
    won_N = np.zeros(len(click_N))
    for sign, score_N in zip((1, -1), scores, strict=False):
        clicks_of(label_N, score_N)
        require_numbers(score_N)
        won_N += sign * pairs_won(click_N, score_N)
    won_P, won_Q = won_N[click_N] / others, won_N[~click_N] / clicks
    if min(clicks, others) < MIN_EACH:
        return float(won_P.mean()), None
    return float(won_P.mean()), math.sqrt(won_P.var(ddof=1) / clicks + won_Q.var(ddof=1) / others)


def _interval(value: float | None, error: float | None) -> tuple[float | None, float | None]:
    if value is None or error is None:
        return None, None
    half = float(norm.ppf(1 - LEVEL / 2)) * error
    return value - half, value + half
