"""AUC, or the difference of two on the same rows, with its standard error.

An AUC is a mean over clicks of the share of other rows that score below, and over other rows of the share of clicks
that score above. The spreads of both shares make its variance, and those of the shares' differences between two models
the variance of the AUCs' difference (DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988). The shares come from one
sort (Sun and Xu, IEEE Signal Processing Letters 21, 2014). Rows have to be independent: where they come in groups, rows
of a group win and lose together, and the error is larger than it seems.

Legend: N rows, of which P clicks and Q others; K different scores.
"""

import math

import numpy as np
import numpy.typing as npt

from features.metrics_input import BoolN, FloatN, clicks_of, require_numbers

MIN_EACH = 5  # rows of a class; the spread of fewer is not known well enough for a normal distribution


def pairs_won(click_N: BoolN, score_N: FloatN) -> npt.NDArray[np.float64]:
    """For a click the others that score below it, for another row the clicks that score above it; ties are half."""
    _, place_N = np.unique(score_N, return_inverse=True)
    clicks_K = np.bincount(place_N, click_N)
    others_K = np.bincount(place_N) - clicks_K
    below_K = np.cumsum(others_K) - others_K / 2
    above_K = clicks_K.sum() - np.cumsum(clicks_K) + clicks_K / 2
    return np.where(click_N, below_K[place_N], above_K[place_N])


def auc_with_error(label_N: npt.ArrayLike, *scores: FloatN) -> tuple[float | None, float | None]:
    """AUC, or that of the first scores minus that of the second, and its standard error.

    AUC is None unless both classes occur, the error unless both do five times.
    """
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
