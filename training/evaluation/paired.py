"""Whether a mean of paired differences over rows that depend on each other in clusters is told apart from zero.

For the many slices of an evaluation, where p must be trusted far below .05: a bootstrap's p cannot be as small as
correcting for hundreds of tests asks. The standard error is the ratio estimator's of cluster sampling (Cochran,
Sampling Techniques, 1977, chapter 11), in closed form. Student's t has the degrees of freedom of as many clusters of
one size as would say as much (Kish, Survey Sampling, 1965; Carter, Schnepel and Steigerwald, Review of Economics and
Statistics 99, 2017): with plain ones a few large clusters among small ones make p < .0002 ten times too frequent. And
where rare clicks make the differences skewed, t itself errs to one side: p is then that of Hall's transformation
(Journal of the Royal Statistical Society B 54, 1992), which takes the skewness out. The larger of the two p counts.

Legend: P rows, G clusters.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from training.evaluation.clusters import worth
from training.evaluation.intervals import LEVEL, verdict
from training.evaluation.results import Difference, FloatN

MIN_CLUSTERS = 5  # of one size; below, a standard error over them says little


def mean_difference(delta_P: FloatN, cluster_P: npt.NDArray[np.integer]) -> Difference:
    """Mean of differences in a loss, where less is better, with Student's 95 % interval.

    With fewer than five clusters, by what they are worth, there is no interval, no p and nothing told apart. As p may
    be Hall's, the interval of a skewed difference that is just not told apart may leave out zero.
    """
    rows_G, mean = np.bincount(cluster_P), float(delta_P.mean())
    clusters, equal = int(np.count_nonzero(rows_G)), float(worth(rows_G))
    if equal < MIN_CLUSTERS:
        return Difference(mean, None, None, None, "t", "not told apart")
    left_G = np.bincount(cluster_P, delta_P - mean).astype(np.float64)  # as it is, which its type does not say
    se = math.sqrt(clusters / (clusters - 1) * float((left_G**2).sum())) / len(delta_P)
    p = float(2 * student.sf(_evidence(mean / se, left_G, clusters), equal - 1)) if se else float(mean == 0)
    half = float(student.ppf(1 - LEVEL / 2, equal - 1)) * se
    return Difference(mean, mean - half, mean + half, p, "t", verdict("logloss", mean, p))


def _evidence(t: float, left_G: FloatN, clusters: int) -> float:
    """|t|, or that of its transformation where it is smaller."""
    root = math.sqrt(clusters)
    skew, s = root * float((left_G**3).sum()) / float((left_G**2).sum()) ** 1.5, t / root
    return min(abs(t), abs(root * (s + skew * s**2 / 3 + skew**2 * s**3 / 27 + skew / (6 * clusters))))
