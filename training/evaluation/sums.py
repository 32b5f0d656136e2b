"""Sums by cluster, which the metrics of any draw of clusters come from.

Legend: N rows, G clusters, J groups, R replicates, B bins of score from low to high, C = G·2·B.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import entr

from features.metrics import log_losses, reliability_edges, squared_errors
from features.metrics_curves import CHUNK
from features.metrics_groups import TOP, codes_of, rank_groups
from training.evaluation.clusters import clusters_of

FloatN = npt.NDArray[np.floating]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer]
RANKED = ("gauc", f"ndcg@{TOP}", "mrr", f"recall@{TOP}")
_CELLS, _MOST_BINS = 8_000_000, 4096  # the most of G × B, and of B


@dataclass(frozen=True)
class Clustered:
    """Labelled rows in clusters, each group whole in one of them; without groups `code_N` is None."""

    click_N: npt.NDArray[np.bool_]
    cluster_N: Ints
    clusters: int
    code_N: Ints | None
    groups: int

    @classmethod
    def of(cls, click_N: npt.NDArray[np.bool_], group_N: npt.ArrayLike | None, seed: int) -> "Clustered":
        cluster_N = clusters_of(group_N, len(click_N), seed=seed)
        code_N, groups = (None, 0) if group_N is None else codes_of(group_N)
        return cls(click_N, cluster_N, int(cluster_N.max(initial=-1)) + 1, code_N, groups)

    def sums(self, score_N: FloatN, ranking_N: FloatN) -> dict[str, Floats]:
        """By name, of [G] each: what `metrics_of_sums` needs, of probabilities and of what orders the rows."""
        edges = reliability_edges(score_N)
        gap_BG = np.zeros((len(edges) + 1, self.clusters))
        found_KG = np.zeros((5, self.clusters))
        for start in range(0, len(score_N), CHUNK):
            part = slice(start, start + CHUNK)
            click, score, cluster = self.click_N[part], score_N[part], self.cluster_N[part]
            total = partial(np.bincount, cluster, minlength=self.clusters)
            columns = (None, click, score, log_losses(click, score), squared_errors(click, score))
            found_KG += np.stack([total(column) for column in columns])
            cell_N = np.searchsorted(edges, score, side="right") * self.clusters + cluster
            gap_BG += np.bincount(cell_N, score - click.astype(np.float64), gap_BG.size).reshape(gap_BG.shape)
        sums = dict(zip(("rows", "clicks", "score", "logloss", "brier"), found_KG, strict=True))
        return sums | {f"gap {index}": gap_G for index, gap_G in enumerate(gap_BG)} | self._grouped(ranking_N)

    def _grouped(self, ranking_N: FloatN) -> dict[str, Floats]:
        """Sums over a cluster's groups of what their rankings are worth, and of what these are divided by."""
        if self.code_N is None:
            return {}
        has = self.code_N >= 0
        cluster_J = np.zeros(self.groups, np.int64)
        cluster_J[self.code_N[has]] = self.cluster_N[has]
        ranked = rank_groups(self.click_N, ranking_N, self.code_N, self.groups)
        both_J = np.where(ranked.has_both_G, ranked.rows_G, 0)
        worth = (both_J * ranked.auc_G, ranked.ndcg_G, ranked.reciprocal_G, ranked.recall_G)
        values = (*map(np.nan_to_num, worth), both_J, ranked.clicks_G > 0)
        sums = [np.bincount(cluster_J, value_J, self.clusters).astype(np.float64) for value_J in values]
        return dict(zip((*RANKED, "both", "clicked"), sums, strict=True))

    def counts(self, score_N: FloatN) -> npt.NDArray[np.float32]:
        """Clicks, and behind them other rows, by cluster and bin of score, of [G, 2·B]; exact below 2^24 of each."""
        edges = self._curve_edges(score_N)
        bins = len(edges) + 1
        count_C = np.zeros(self.clusters * 2 * bins, np.int32)
        for start in range(0, len(score_N), CHUNK):
            part = slice(start, start + CHUNK)
            bin_N = np.searchsorted(edges, score_N[part], side="right") + bins * ~self.click_N[part]
            np.add.at(count_C, self.cluster_N[part] * 2 * bins + bin_N, np.int32(1))
        return count_C.reshape(self.clusters, 2 * bins).astype(np.float32)

    def _curve_edges(self, score_N: FloatN) -> FloatN:
        """Where bins of score begin: at every score of few rows, else at quantiles of the clicks' and others'."""
        most = min(_CELLS // self.clusters, _MOST_BINS)
        share = np.linspace(0, 1, most // 2 + 1)[1:-1]
        if len(score_N) <= most:
            return np.unique(score_N)[1:]
        parts = [score_N[mine_N] for mine_N in (self.click_N, ~self.click_N) if mine_N.any()]
        return np.unique(np.concatenate([np.quantile(part, share, method="lower") for part in parts]))


def metrics_of_sums(sums: Mapping[str, Floats]) -> dict[str, Floats]:
    """Metrics by replicate, of [R], from sums by replicate; NaN where not defined."""
    rows_R, clicks_R = sums["rows"], sums["clicks"]
    rate_R = clicks_R / rows_R
    logloss_R = sums["logloss"] / rows_R
    ne_R = _ratio(logloss_R, entr(rate_R) + entr(1 - rate_R))
    gaps = [np.abs(sum_R) for name, sum_R in sums.items() if name.startswith("gap ")]
    found = {
        "logloss": logloss_R,
        "ne": ne_R,
        "rig": 1 - ne_R,
        "brier": sums["brier"] / rows_R,
        "calibration": _ratio(sums["score"], clicks_R),
        "ece": np.sum(gaps, axis=0) / rows_R,
    }
    if "both" in sums:
        of = dict.fromkeys(RANKED, "clicked") | {"gauc": "both"}
        found |= {name: _ratio(sums[name], sums[of[name]]) for name in RANKED} | {"coverage": sums["both"] / rows_R}
    return found


def areas_of_counts(count_RB: npt.NDArray[Any]) -> dict[str, Floats]:
    """AUC and PR-AUC by replicate, of [R], as `features.metrics_curves` defines them, from `counts` by replicate."""
    clicks_RB, others_RB = np.split(count_RB.astype(np.float64), 2, axis=1)
    clicks_R, others_R = clicks_RB.sum(axis=1), others_RB.sum(axis=1)
    wins_R = (clicks_RB * (np.cumsum(others_RB, axis=1) - others_RB / 2)).sum(axis=1)
    true_RB = clicks_R[:, None] - np.cumsum(clicks_RB, axis=1) + clicks_RB
    seen_RB = true_RB + others_R[:, None] - np.cumsum(others_RB, axis=1) + others_RB
    precise_R = (clicks_RB * true_RB / np.maximum(seen_RB, 1)).sum(axis=1)
    return {
        "auc": _ratio(wins_R, clicks_R * others_R),
        "pr_auc": np.where(others_R > 0, _ratio(precise_R, clicks_R), np.nan),
    }


def _ratio(part_R: Floats, whole_R: Floats) -> Floats:
    return np.divide(part_R, whole_R, out=np.full(len(whole_R), np.nan), where=whole_R > 0)
