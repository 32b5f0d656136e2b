"""Areas under the ROC and the precision-recall curve, both from one sort of the rows, or from counts in bins.

A score becomes an unsigned integer of 32 bits in the same order, which is sorted with the row's label in its lowest
bit: sorting integers takes a fraction of the time of sorting places by score.

Legend: N rows, K scores that occur, or bins of them, from low to high.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from features.metrics_input import BoolN, FloatN

Ints = npt.NDArray[np.integer]
EXACT_ROWS = 20_000_000
CHUNK = 1 << 20  # rows at a time, where all at once would take several times the memory of the scores
_SIGN = np.uint32(1 << 31)
_BINS = 22  # bits


@dataclass(frozen=True)
class Area:
    """An area under a curve, None unless both classes occur; the exact one is at most `bound` away (0: it is exact)."""

    value: float | None
    bound: float = 0.0


@dataclass(frozen=True)
class Counts:
    """Clicks and other rows of each score that occurs, or of each bin of neighbouring scores if not `exact`."""

    clicks_K: Ints
    others_K: Ints
    exact: bool = True

    @property
    def pairs(self) -> int:
        """Of a click and another row."""
        return int(self.clicks_K.sum()) * int(self.others_K.sum())


def ordinals(score_N: FloatN) -> npt.NDArray[np.uint32]:
    """Whole numbers in the order of the scores, equal for equal ones: the bits of fp32, else the rank among those."""
    if score_N.dtype.itemsize > 4:
        return np.unique(score_N, return_inverse=True)[1].astype(np.uint32)
    bits = (score_N.astype(np.float32) + np.float32(0)).view(np.uint32)  # −0 + 0 is 0
    return np.where(bits >= _SIGN, ~bits, bits | _SIGN)  # below 0 larger bits are further down


def count_scores(click_N: BoolN, score_N: FloatN, exact_rows: int = EXACT_ROWS) -> Counts:
    """Count the rows by score; above `exact_rows` by bins of fp32 scores, in memory that does not grow with rows."""
    return _binned(click_N, score_N) if len(score_N) > exact_rows else _exact(click_N, score_N)


def roc_area(counts: Counts) -> Area:
    """The share of pairs of a click and another row in which the click scores higher; equal scores are half a pair.

    A bin's p clicks and n others make p·n pairs that count as half, p·n/2, and truly win between 0 and p·n: that is
    p·n/2 off at most, and pairs across bins are exact.
    """
    if not counts.pairs:
        return Area(None)
    clicks_K, others_K = counts.clicks_K.astype(np.int64), counts.others_K.astype(np.int64)
    below_K = np.cumsum(others_K) - others_K
    halves = int((clicks_K * (2 * below_K + others_K)).sum())  # whole numbers: no rounding
    tied = 0 if counts.exact else int((clicks_K * others_K).sum())
    return Area(halves / (2 * counts.pairs), tied / (2 * counts.pairs))


def precision_recall_area(counts: Counts) -> Area:
    """Average precision: the mean over clicks of the share of clicks among rows that score as high or higher.

    In a bin of p clicks and n others below which T clicks among C rows score higher, a click's precision is at most
    (T + p) / (C + p), if no other row of the bin is above it, and at least (T + 1) / (C + n + 1), if all are.
    """
    if not counts.pairs:
        return Area(None)
    clicks_K, others_K = counts.clicks_K[::-1].astype(np.int64), counts.others_K[::-1].astype(np.int64)
    true_K, seen_K = np.cumsum(clicks_K), np.cumsum(clicks_K + others_K)
    value = _mean(true_K, seen_K, clicks_K)
    if counts.exact:
        return Area(value)
    before_K = seen_K - clicks_K - others_K
    high = _mean(true_K, before_K + clicks_K, clicks_K)
    low = _mean(true_K - clicks_K + 1, before_K + others_K + 1, clicks_K)
    return Area(value, max(high - value, value - low))


def _mean(part_K: Ints, whole_K: Ints, clicks_K: Ints) -> float:
    """Mean over clicks of part / whole of their score."""
    has = clicks_K > 0
    return float((part_K[has] / whole_K[has] * clicks_K[has]).sum() / clicks_K.sum())


def _exact(click_N: BoolN, score_N: FloatN) -> Counts:
    key_N = ordinals(score_N).astype(np.uint64) << np.uint64(1) | click_N
    key_N.sort()
    end_K = np.flatnonzero(np.append(key_N[1:] >> np.uint64(1) != key_N[:-1] >> np.uint64(1), len(key_N) > 0))
    clicks_K = np.diff(np.cumsum(key_N & np.uint64(1), dtype=np.int64)[end_K], prepend=0)
    return Counts(clicks_K, np.diff(end_K, prepend=-1) - clicks_K)


def _binned(click_N: BoolN, score_N: FloatN) -> Counts:
    """By up to 2^22 bins of the range that the scores take, each of as many neighbouring fp32 numbers."""
    extremes = np.array([score_N.min(), score_N.max()], np.float32)
    low, high = (int(ordinal) for ordinal in ordinals(extremes))
    shift = max((high - low).bit_length() - _BINS, 0)
    counts_LK: npt.NDArray[Any] = np.zeros((2, (high - low >> shift) + 1), np.int64)
    for start in range(0, len(score_N), CHUNK):
        chunk = slice(start, start + CHUNK)
        bin_N = ordinals(score_N[chunk].astype(np.float32)) - np.uint32(low) >> np.uint32(shift)
        for label, mine_N in enumerate((~click_N[chunk], click_N[chunk])):
            counts_LK[label] += np.bincount(bin_N[mine_N], minlength=counts_LK.shape[1])
    return Counts(counts_LK[1], counts_LK[0], exact=False)
