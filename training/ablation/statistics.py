"""What the differences between cells are worth, each cell trained with several seeds and scored on the same test rows.

Two things are left to chance: the seed of a run, and which rows the test set happens to hold. The rows are resampled by
a bootstrap of clusters, with the same weights for every run, so that differences are paired. Seeds are crossed with it
in closed form: of a variance over (seed, row) pairs, what belongs to seeds, to rows and to single pairs is told apart
and counted once. Drawing seeds as well would count single pairs three times (Owen, The pigeonhole bootstrap, 2007), and
percentiles of a handful of seeds make intervals too short, where Student's t allows for their number. With five seeds
p < .05 comes by chance in at most 5 %, and p < .0033, which Holm's correction asks of fifteen cells, in .5 %.

S seeds, N rows, G clusters, R replicates, M metrics, K columns; place 0 of an R axis is the test set itself.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import entr
from scipy.stats import t as student

from features.metrics import log_losses, reliability_edges
from features.metrics_delong import pairs_won
from training.evaluation.clusters import drawn_weights, holm

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]
METRICS = ("auc", "logloss", "ne", "ece")
LEVEL, POWER = 0.05, 0.8


@dataclass(frozen=True)
class Estimate:
    """A metric of a cell: its mean over seeds and the 95 % interval of that (Student's t, seeds and test rows).

    With a single seed the interval leaves out what another seed would change, and sd_seeds is None.
    """

    mean: float
    low: float
    high: float
    by_seed: dict[int, float]
    sd_seeds: float | None


@dataclass(frozen=True)
class Difference:
    """Mean over common seeds of cell − baseline, its 95 % interval and standard error, and p of no difference.

    p_holm is corrected for the other cells; detectable is the least difference seen with 80 % power after Bonferroni's
    correction; the verdict is "better", "worse" or "not told apart". With one common seed all leave out what another
    seed would change.
    """

    mean: float
    low: float
    high: float
    se: float
    p: float
    p_holm: float
    detectable: float
    seeds: int
    verdict: str


@dataclass(frozen=True)
class CellStatistics:
    """By metric; None where it is not defined, where runs are missing, and for the baseline's own difference."""

    estimates: dict[str, Estimate | None]
    differences: dict[str, Difference | None]


def compare(
    label_N: Floats,
    cluster_N: Ints,
    cells: Iterable[tuple[str, Mapping[int, Floats]]],
    *,
    baseline: str,
    replicates: int = 2000,
    seed: int = 0,
) -> dict[str, CellStatistics]:
    """Statistics by cell, from the scores of each of its finished seeds; cells are taken one at a time.

    ValueError without a finished baseline, with fewer than two clusters, or for a score that is not finite.
    """
    resampled = Resampled.of(label_N, cluster_N, replicates, seed)
    runs = {name: {s: resampled.metrics(score_N) for s, score_N in scores.items()} for name, scores in cells}
    if not runs.get(baseline):
        raise ValueError(f"baseline {baseline!r} {'has no finished seed' if baseline in runs else 'is not a cell'}")
    estimates: dict[str, dict[str, Estimate | None]] = {name: {} for name in runs}
    differences: dict[str, dict[str, Difference | None]] = {name: dict.fromkeys(METRICS) for name in runs}
    for index, metric in enumerate(METRICS):
        means: dict[str, _Mean] = {}
        for name, run in runs.items():
            value = {s: run[s][index] for s in sorted(run)}
            estimates[name][metric] = _estimate(value, resampled.clusters)
            delta = [value[s] - runs[baseline][s][index] for s in value if s in runs[baseline]]
            if name != baseline and delta and np.isfinite(delta).all():
                means[name] = _Mean.of(np.stack(delta), resampled.clusters)
        corrected = holm([mean.p for mean in means.values()])
        for (name, mean), p_holm in zip(means.items(), corrected, strict=True):
            differences[name][metric] = mean.difference(p_holm, len(means), more_is_better=metric == "auc")
    return {name: CellStatistics(estimates[name], differences[name]) for name in runs}


@dataclass(frozen=True)
class Resampled:
    """The test set and its bootstrap replicates, as rows and clicks that each has, [1 + R]."""

    click_N: npt.NDArray[np.bool_]
    cluster_N: Ints
    weight_RG: Floats
    rows_R: Floats
    clicks_R: Floats

    @classmethod
    def of(cls, label_N: Floats, cluster_N: Ints, replicates: int, seed: int) -> "Resampled":
        """Draw the clusters, see `drawn_weights`."""
        click_N = label_N > 0
        weight_RG = drawn_weights(int(cluster_N.max()) + 1, replicates, seed)
        rows_R = weight_RG @ np.bincount(cluster_N)
        clicks_R = weight_RG @ np.bincount(cluster_N, click_N)
        both_R = (clicks_R > 0) & (clicks_R < rows_R)
        if both_R[0] and not both_R.all():  # a draw of few clusters may lack a class, which leaves AUC undefined
            weight_RG, rows_R, clicks_R = weight_RG[both_R], rows_R[both_R], clicks_R[both_R]
        return cls(click_N, cluster_N, weight_RG, rows_R, clicks_R)

    @property
    def clusters(self) -> int:
        """G."""
        return self.weight_RG.shape[1]

    def metrics(self, score_N: Floats) -> Floats:
        """Each of METRICS as features.metrics defines it, [M, 1 + R], NaN where not defined.

        A replicate's AUC is linear in its weights: means of the share of the other class a row beats (DeLong, 1988).
        """
        if not np.isfinite(score_N).all():
            raise ValueError("a score is not finite")
        click_N, won_N = self.click_N, pairs_won(self.click_N, score_N)
        columns = (log_losses(click_N, score_N), won_N * click_N, won_N * ~click_N)
        sum_KG = [np.bincount(self.cluster_N, column_N) for column_N in columns]
        sum_RK = self.weight_RG @ np.concatenate([sum_KG, self._bin_gaps(score_N)]).T
        negatives_R, rate_R = self.rows_R - self.clicks_R, self.clicks_R / self.rows_R
        logloss_R = sum_RK[:, 0] / self.rows_R
        entropy_R = entr(rate_R) + entr(1 - rate_R)
        with np.errstate(invalid="ignore"):  # 0 of 0 pairs
            of_positives_R = sum_RK[:, 1] / self.clicks_R / negatives_R[0]
            of_negatives_R = sum_RK[:, 2] / negatives_R / self.clicks_R[0]
        ne_R = logloss_R / np.where(entropy_R > 0, entropy_R, np.nan)
        auc_R = of_positives_R + of_negatives_R - of_positives_R[0]
        return np.stack([auc_R, logloss_R, ne_R, np.abs(sum_RK[:, 3:]).sum(axis=1) / self.rows_R])

    def _bin_gaps(self, score_N: Floats) -> npt.NDArray[Any]:
        """Sums of score − label by bin of features.metrics.reliability and cluster; the bins stay as they are here."""
        edges = reliability_edges(score_N)
        cell_N = np.searchsorted(edges, score_N, side="right") * self.clusters + self.cluster_N
        gaps = np.bincount(cell_N, score_N.astype(np.float64) - self.click_N, (len(edges) + 1) * self.clusters)
        return gaps.reshape(-1, self.clusters)


@dataclass(frozen=True)
class _Mean:
    """A mean over seeds, its standard error, and the degrees of freedom of that.

    Those are the harmonic mean of the parts' own by their shares in the variance: fewer than Satterthwaite's (1946),
    whose estimate is bold where a few seeds make up most of it, and most at the small levels that corrections use.
    """

    mean: float
    se: float
    freedom: float
    seeds: int

    @classmethod
    def of(cls, value_SR: Floats, clusters: int) -> "_Mean":
        seeds, mean = len(value_SR), float(value_SR[:, 0].mean())
        mean_R = value_SR[:, 1:].mean(axis=0)
        of_test = float(mean_R.var(ddof=1))
        if seeds == 1:
            return cls(mean, math.sqrt(of_test), clusters - 1, seeds)
        of_seeds = float(value_SR[:, 0].var(ddof=1)) / seeds
        # the part of single pairs is in both; taken out of one of them it counts once
        of_pairs = float((value_SR[:, 1:] - mean_R).var(axis=1, ddof=1).sum()) / (seeds - 1) / seeds
        of_test = max(of_test - of_pairs, 0.0)
        if of_seeds + of_test == 0:
            return cls(mean, 0.0, clusters - 1, seeds)
        share = of_seeds / (of_seeds + of_test)
        freedom = 1 / (share / (seeds - 1) + (1 - share) / (clusters - 1))
        return cls(mean, math.sqrt(of_seeds + of_test), freedom, seeds)

    @property
    def p(self) -> float:
        """Two-sided p of a mean of zero."""
        if self.se == 0:
            return float(self.mean == 0)
        return float(2 * student.sf(abs(self.mean) / self.se, self.freedom))

    def interval(self) -> tuple[float, float]:
        half = float(student.ppf(1 - LEVEL / 2, self.freedom)) * self.se
        return self.mean - half, self.mean + half

    def difference(self, p_holm: float, compared: int, more_is_better: bool) -> Difference:
        quantiles = student.ppf(1 - LEVEL / 2 / compared, self.freedom) + student.ppf(POWER, self.freedom)
        told = "better" if (self.mean > 0) == more_is_better else "worse"
        verdict = told if p_holm < LEVEL and self.seeds > 1 else "not told apart"
        detectable = float(quantiles) * self.se
        return Difference(self.mean, *self.interval(), self.se, self.p, p_holm, detectable, self.seeds, verdict)


def _estimate(value: dict[int, Floats], clusters: int) -> Estimate | None:
    if not value or not np.isfinite(list(value.values())).all():
        return None
    mean = _Mean.of(np.stack(list(value.values())), clusters)
    by_seed = {s: float(value_R[0]) for s, value_R in value.items()}
    sd_seeds = float(np.std(list(by_seed.values()), ddof=1)) if len(by_seed) > 1 else None
    return Estimate(mean.mean, *mean.interval(), by_seed, sd_seeds)
