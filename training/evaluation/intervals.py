"""What chance leaves a metric: 95 % intervals by resampling the rows, and paired differences of two models.

The bootstrap draws clusters of rows with replacement: groups where a group is declared, since the rows of a user depend
on each other, else single rows; more than 10,000 are drawn in that many random bundles (`clusters_of`). All scorers get
the same draws, so that what they share cancels in a difference. The metrics of a draw come from sums by cluster: of
losses and errors by row, of what a ranking is worth by group, and, for areas under curves, of clicks and other rows by
bin of score. Small data have a bin for each score, large data some hundreds; what bins take away from an area is added
again, so that only its spread is that of binned scores. A draw of ten million rows costs no more than one of ten
thousand, so there are always as many.

Legend: N rows, G clusters, R replicates; place 0 of an R axis is the rows as they are.
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from features.metrics import score_metrics
from features.metrics_input import clicks_of
from training.evaluation.clusters import drawn_weights, worth
from training.evaluation.results import Difference, Estimate, Verdict
from training.evaluation.sums import RANKED, Clustered, FloatN, Floats, areas_of_counts, metrics_of_sums

Draws = Mapping[str, Floats]
REPLICATES, LEVEL = 1000, 0.05
MIN_CLUSTERS = 8  # of one size; fewer leave their draws too few values for a percentile of 2.5 %
HIGHER_IS_BETTER = {"auc", "pr_auc", "rig", *RANKED}
_BLOCK = 100  # replicates at a time


class Resampling:
    """Labelled rows, and the draws of them that every scorer is measured on."""

    def __init__(
        self,
        label_N: FloatN,
        group_N: npt.ArrayLike | None = None,
        *,
        replicates: int = REPLICATES,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Draw; of too few clusters nothing is drawn: `replicates` is 0, and intervals and p are None.

        Too few are those worth fewer than eight of one size (`training.evaluation.clusters.worth`).

        Args:
            group_N: of each row, None for a row without; None where no group is declared.
            progress: told how many draws more are done, whenever a scorer has been measured on some.
        """
        self._label_N, self._group_N = label_N, group_N
        self._rows = Clustered.of(clicks_of(label_N, label_N), group_N, seed)
        self.clusters = self._rows.clusters
        self.replicates = replicates if worth(np.bincount(self._rows.cluster_N)) >= MIN_CLUSTERS else 0
        self._weight_RG = np.ones((1, self.clusters), np.float32)  # whole numbers, so that fp32 is exact
        if self.replicates:
            self._weight_RG = drawn_weights(self.clusters, replicates, seed).astype(np.float32)
        self._progress = progress

    def draws(
        self,
        score_N: FloatN,
        ranking_N: FloatN | None = None,
        metrics: Mapping[str, float | None] | None = None,
    ) -> Draws:
        """Each metric of `score_metrics` by replicate, of [1 + R]; NaN where it is not defined.

        Args:
            score_N: probabilities.
            ranking_N: what orders the rows; the probabilities unless given.
            metrics: of the rows as they are, where they have been computed before.
        """
        ranking_N = score_N if ranking_N is None else ranking_N
        found = metrics or score_metrics(self._label_N, score_N, self._group_N, ranking_N)
        sums, count_GB = self._rows.sums(score_N, ranking_N), self._rows.counts(ranking_N)
        sum_GK = np.stack(list(sums.values()), axis=1)
        parts = []
        for start in range(0, len(self._weight_RG), _BLOCK):
            weight_RG = self._weight_RG[start : start + _BLOCK]
            sums_R = dict(zip(sums, (weight_RG.astype(np.float64) @ sum_GK).T, strict=True))
            parts.append(metrics_of_sums(sums_R) | areas_of_counts(weight_RG @ count_GB))
            if self._progress is not None:
                self._progress(len(weight_RG) - (start == 0))
        drawn = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {name: _around(name, value, drawn.get(name), len(self._weight_RG)) for name, value in found.items()}

    def estimates(self, score_N: FloatN, ranking_N: FloatN | None = None) -> dict[str, Estimate]:
        """Each metric with its interval."""
        return estimates_of(self.draws(score_N, ranking_N))

    def differences(self, score_N: FloatN, other_N: FloatN) -> dict[str, Difference]:
        """Each metric of the first scores minus that of the others, see `differences_of`."""
        return differences_of(self.draws(score_N), self.draws(other_N))


def estimates_of(draws: Draws) -> dict[str, Estimate]:
    """Each metric with its 95 % interval: percentiles of the draws, None if it is undefined in half of them."""
    return {
        name: _of_ece(value_R) if name == "ece" else Estimate(_value(value_R), *interval(value_R[1:]))
        for name, value_R in draws.items()
    }


def _of_ece(value_R: Floats) -> Estimate:
    """Noise adds up in ECE: that of few rows is above the true one, and that of a draw, with noise twice, above theirs.

    The draws are lowered by as much as they are above the rows' value, and the interval's lower end by that once more,
    since the rows' value is above the true one by about as much.
    """
    value, drawn_R = float(value_R[0]), value_R[1:]
    low, high = interval(drawn_R)
    if low is None or high is None:
        return Estimate(value)
    lifted = max(float(drawn_R.mean()) - value, 0.0)
    return Estimate(value, max(low - 2 * lifted, 0.0), max(high - lifted, value))


def differences_of(draws: Draws, others: Draws) -> dict[str, Difference]:
    """Each metric of the first draws minus that of the others, paired by draw.

    Of calibration it is the difference of the distances from 1. Coverage belongs to the rows and not to scores, and has
    none.
    """
    return {name: difference(name, draws[name], others[name]) for name in draws if name != "coverage"}


def difference(name: str, value_R: Floats, other_R: Floats) -> Difference:
    """Of one metric; p is twice the smaller share of draws on either side of 0, counting one more on both.

    The interval leaves 0 out when p is below 5 % (Davison and Hinkley, Bootstrap Methods, 1997, 4.2.4 and 5.3.2).
    """
    if name == "calibration":
        value_R, other_R = np.abs(value_R - 1), np.abs(other_R - 1)
    delta_R = value_R - other_R
    if name == "ece" and len(delta_R) > 1:  # noise lifts that of draws, of both models about alike
        delta_R[1:] -= delta_R[1:].mean() - delta_R[0]
    low, high = interval(delta_R[1:])
    p = None
    if low is not None:
        drawn = delta_R[1:][np.isfinite(delta_R[1:])]
        p = min(2 * (1 + int(min((drawn <= 0).sum(), (drawn >= 0).sum()))) / (len(drawn) + 1), 1.0)
    value = _value(delta_R)
    return Difference(value, low, high, p, "bootstrap", verdict(name, value, p))


def verdict(name: str, value: float | None, p: float | None) -> Verdict:
    """What a difference says of the first model, by the metric's direction."""
    if value is None or p is None or p >= LEVEL:
        return "not told apart"
    return "better" if (value > 0) == (name in HIGHER_IS_BETTER) else "worse"


def interval(value_R: Floats) -> tuple[float | None, float | None]:
    """95 % percentile interval of draws; None if half of them or more are not defined."""
    drawn = np.sort(value_R[np.isfinite(value_R)])
    if 2 * len(drawn) <= len(value_R) or len(drawn) == 0:
        return None, None
    place = max(int(LEVEL / 2 * (len(drawn) + 1)), 1)
    return float(drawn[place - 1]), float(drawn[-place])


def _around(name: str, value: float | None, drawn_R: Floats | None, draws: int) -> Floats:
    """Draws of a metric with what is known of all rows in place 0."""
    if value is None or drawn_R is None:
        return np.full(draws, np.nan)
    value_R = value + (drawn_R - drawn_R[0])
    return np.clip(value_R, 0.0, 1.0) if name in ("auc", "pr_auc") else value_R


def _value(value_R: Floats) -> float | None:
    return float(value_R[0]) if np.isfinite(value_R[0]) else None
