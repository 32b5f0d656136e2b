"""What rankings are worth within groups of rows: users, or requests.

Equal scores are in every order equally often, and a metric is its mean over those orders: constant scores are worth
what a random order is, and which row came first in the file does not count.

Legend: N rows, G groups, K runs of equal scores within a group, by group and from the highest score down.
"""

from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import gammaln

from features.metrics_curves import CHUNK, Ints, ordinals
from features.metrics_input import BoolN, FloatN

TOP = 10
_HIGHEST = np.uint32(0xFFFFFFFF)
_SCORE, _LABEL = np.uint64(33), np.uint64(1)  # bits below a key's group, and below its score


@dataclass(frozen=True)
class Rankings:
    """What each group's ranking is worth; NaN where it is not defined: AUC with one class, the others without a click.

    Attributes:
        auc_G: share of pairs of a click and another row in which the click scores higher.
        ndcg_G: discounted gain Σ label / log2(1 + rank) of the first `top` rows over the most there can be
            (Järvelin and Kekäläinen, ACM TOIS 20, 2002).
        reciprocal_G: 1 / rank of the first click.
        recall_G: share of the clicks that are among the first `top` rows.
    """

    rows_G: Ints
    clicks_G: Ints
    auc_G: FloatN
    ndcg_G: FloatN
    reciprocal_G: FloatN
    recall_G: FloatN

    @property
    def has_both_G(self) -> BoolN:
        return (self.clicks_G > 0) & (self.clicks_G < self.rows_G)

    def means(self, top: int = TOP) -> dict[str, float | None]:
        """Over groups: of AUC weighted by rows (DIN, KDD 2018), of the others every group with a click alike."""
        both_G, clicked_G = self.has_both_G, self.clicks_G > 0

        def mean(value_G: FloatN, of_G: BoolN, weight_G: Ints | None = None) -> float | None:
            return float(np.average(value_G[of_G], weights=weight_G)) if of_G.any() else None

        return {
            "gauc": mean(self.auc_G, both_G, self.rows_G[both_G]),
            f"ndcg@{top}": mean(self.ndcg_G, clicked_G),
            "mrr": mean(self.reciprocal_G, clicked_G),
            f"recall@{top}": mean(self.recall_G, clicked_G),
        }


def codes_of(group_N: npt.ArrayLike) -> tuple[Ints, int]:
    """Number of each row's group from 0, −1 for a row without one (None or NaN); and the number of groups."""
    code_N, known = pd.factorize(np.asarray(group_N))
    return code_N, len(known)


def rank_groups(click_N: BoolN, score_N: FloatN, code_N: Ints, groups: int, top: int = TOP) -> Rankings:
    """Rank each group's rows by score; rows of code −1 are left out. One sort, by group and score at once."""
    key_N = _keys(click_N, score_N, code_N)
    rows_G = np.bincount(code_N[code_N >= 0], minlength=groups)
    start_G = np.append(0, np.cumsum(rows_G))
    cuts = np.unique(np.append(np.searchsorted(start_G, np.arange(0, len(key_N), CHUNK)), groups))
    parts = [_rankings(key_N[start_G[low] : start_G[high]], rows_G[low:high], low, top) for low, high in pairwise(cuts)]
    if not parts:
        return Rankings(rows_G, rows_G, *(np.empty(0) for _ in range(4)))
    return Rankings(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Rankings)))


def _keys(click_N: BoolN, score_N: FloatN, code_N: Ints) -> npt.NDArray[np.uint64]:
    """Group, descending score and label of each row in one number, in order."""
    key_N = (_HIGHEST - ordinals(score_N)).astype(np.uint64)
    key_N <<= _LABEL
    key_N |= click_N
    key_N |= code_N.astype(np.uint64) << _SCORE
    if (code_N < 0).any():
        key_N = key_N[code_N >= 0]
    key_N.sort()
    return key_N


def _rankings(key_N: npt.NDArray[np.uint64], rows_G: Ints, first_code: int, top: int) -> Rankings:
    run_N = key_N >> _LABEL
    start_K = np.flatnonzero(np.append(True, run_N[1:] != run_N[:-1]))
    rows_K = np.diff(start_K, append=len(key_N))
    clicks_K = np.add.reduceat((key_N & _LABEL).astype(np.int64), start_K)
    group_K = (key_N[start_K] >> _SCORE).astype(np.int64) - first_code
    first_G = np.flatnonzero(np.diff(group_K, prepend=-1))
    clicks_G = np.add.reduceat(clicks_K, first_G)
    above_K = start_K - (np.cumsum(rows_G) - rows_G)[group_K]  # rows of the group that score higher
    higher_K = np.cumsum(clicks_K) - clicks_K
    higher_K -= higher_K[first_G][group_K]  # and clicks

    def total(value_K: FloatN) -> FloatN:
        return np.add.reduceat(value_K, first_G)

    others_K = rows_K - clicks_K
    below_K = (rows_G - clicks_G)[group_K] - (above_K - higher_K) - others_K
    discount = np.append(0, np.cumsum(1 / np.log2(np.arange(2, top + 2))))  # of the first 0, 1, … rows
    start_T, end_T = np.minimum(above_K, top), np.minimum(above_K + rows_K, top)
    share_K = clicks_K / rows_K
    leading_K = (higher_K == 0) & (clicks_K > 0)  # one run of each group with a click
    reciprocal_G = np.full(len(rows_G), np.nan)
    reciprocal_G[group_K[leading_K]] = _reciprocal(above_K[leading_K], rows_K[leading_K], clicks_K[leading_K])
    with np.errstate(invalid="ignore"):  # 0 of 0 pairs or clicks is NaN
        return Rankings(
            rows_G,
            clicks_G,
            total(clicks_K * (below_K + others_K / 2)) / (clicks_G * (rows_G - clicks_G)),
            total(share_K * (discount[end_T] - discount[start_T])) / discount[np.minimum(clicks_G, top)],
            reciprocal_G,
            total(share_K * (end_T - start_T)) / clicks_G,
        )


def _reciprocal(above_K: Ints, rows_K: Ints, clicks_K: Ints) -> FloatN:
    """Mean over all orders of equal scores of 1 / rank of the first click, `above` rows scoring higher.

    It is the j-th of t rows of which c are clicks with probability C(t − j, c − 1) / C(t, c).
    """
    mean_K = 1.0 / (above_K + 1)
    tied_K = np.flatnonzero(rows_K > 1)
    places_K = (rows_K - clicks_K + 1)[tied_K]
    if len(tied_K) == 0:
        return mean_K
    first_K = np.cumsum(places_K) - places_K
    j = np.arange(1, places_K.sum() + 1) - np.repeat(first_K, places_K)
    above, t, c = (np.repeat(value_K[tied_K], places_K) for value_K in (above_K, rows_K, clicks_K))
    # the logarithm of the ratio of binomials, common factors left out
    chance = gammaln(t - j + 1) - gammaln(t - j - c + 2) + gammaln(t - c + 1) - gammaln(t + 1) + np.log(c)
    mean_K[tied_K] = np.add.reduceat(np.exp(chance) / (above + j), first_K)
    return mean_K
