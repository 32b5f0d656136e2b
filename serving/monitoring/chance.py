"""How much of a stability index is chance: rows of one user or request are alike, and few of them differ from many.

Legend: R random parts of the users or requests, G groups of a field's values.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

from features.metrics import psi

PARTS = 512  # R: what is not independent falls into the same part
FEWEST = 20  # parts that are needed to tell how much they differ

CountG = npt.NDArray[np.int64]
CountRG = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shift:
    """A stability index, what of it chance alone leaves on average, and how often chance leaves more than all of it."""

    psi: float
    chance: float
    p: float

    @property
    def beyond_chance(self) -> float:
        """What is left of the index, at least 0."""
        return max(0.0, self.psi - self.chance)


def shift_of(expected_G: CountG, found_RG: CountRG) -> Shift:
    """The shift from training to rows that are counted by random part.

    To second order the index is Σ (q − p)² / p of the shares p in training and q found. Without drift it is a weighted
    sum of χ² variables whose weights are the eigenvalues of q's covariance, scaled by the shares; the parts give that
    covariance whatever depends on what within one (the random group method; Wolter, Introduction to Variance
    Estimation, 2007, chapter 2), and the sum is near g · χ²(h) of the same mean and variance (Satterthwaite, 1946). The
    trained rows add their own as if they were independent.
    """
    found_G = found_RG.sum(0)
    rows, parts = int(found_G.sum()), int(np.count_nonzero(found_RG.sum(1)))
    p_G, q_G = (((count_G + 0.5) / (count_G + 0.5).sum()) for count_G in (expected_G, found_G))
    scale_G = np.sqrt((p_G + q_G) / 2)
    off_RG = (found_RG - found_RG.sum(1, keepdims=True) * (found_G / rows)) / rows / scale_G
    found_GG = off_RG.T @ off_RG * (parts / max(1, parts - 1))
    alike = max(1.0, float(np.trace(found_GG) / np.trace(_independent(q_G, scale_G) / rows)))
    spread_GG = found_GG + _independent(p_G, scale_G) / expected_G.sum()
    mean, square = float(np.trace(spread_GG)), float((spread_GG**2).sum())
    index = psi(expected_G, found_G / alike)
    return Shift(index, mean, float(chi2.sf(index * mean / square, mean**2 / square)))


def _independent(share_G: npt.NDArray[np.float64], scale_G: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Covariance [G, G] of the scaled shares of one independent row."""
    return (np.diag(share_G) - np.outer(share_G, share_G)) / np.outer(scale_G, scale_G)
