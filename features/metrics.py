"""Statistics of scored rows. Labels are 0 or 1, scores probabilities; None where a metric is not defined."""

import math

import numpy as np
import numpy.typing as npt
import polars as pl
from sklearn.metrics import average_precision_score, roc_auc_score

FloatN = npt.NDArray[np.floating]
_CLIP = float(np.finfo(np.float64).eps)  # as scikit-learn: a probability of exactly 0 or 1 would be infinitely wrong
ECE_BINS = 20


def auc(label_N: FloatN, score_N: FloatN) -> float | None:
    """Area under the ROC curve; None unless both classes occur."""
    return float(roc_auc_score(label_N, score_N)) if _both_classes(label_N) else None


def auc_standard_error(auc: float, positives: int, negatives: int) -> float:
    """Standard error of an AUC over independent rows (Hanley and McNeil, Radiology 143, 1982)."""
    one_positive, one_negative = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    spread = (positives - 1) * (one_positive - auc**2) + (negatives - 1) * (one_negative - auc**2)
    return math.sqrt((auc * (1 - auc) + spread) / (positives * negatives))


def pr_auc(label_N: FloatN, score_N: FloatN) -> float | None:
    """Average precision (the step-wise area under the precision-recall curve); None unless both classes occur."""
    return float(average_precision_score(label_N, score_N)) if _both_classes(label_N) else None


def logloss(label_N: FloatN, score_N: FloatN, weight_N: FloatN | None = None) -> float:
    """Mean negative log-likelihood, in nats."""
    score = np.clip(score_N.astype(np.float64), _CLIP, 1 - _CLIP)
    loss_N = -np.where(label_N > 0, np.log(score), np.log1p(-score))
    return float(np.average(loss_N, weights=weight_N))


def normalized_entropy(label_N: FloatN, score_N: FloatN) -> float | None:
    """Log loss over that of always predicting the base rate (He et al., 2014): below 1 is better than that."""
    rate = float(np.mean(label_N))
    if rate in (0.0, 1.0):
        return None
    return logloss(label_N, score_N) / logloss(label_N, np.full(len(label_N), rate))


def brier(label_N: FloatN, score_N: FloatN) -> float:
    """Mean squared difference between score and label."""
    return float(np.mean((score_N.astype(np.float64) - label_N) ** 2))


def calibration(label_N: FloatN, score_N: FloatN) -> float | None:
    """Predicted clicks over observed clicks; None without a click."""
    clicks = float(np.sum(label_N))
    return float(np.sum(score_N, dtype=np.float64)) / clicks if clicks else None


def reliability(
    label_N: FloatN, score_N: FloatN, bins: int = ECE_BINS
) -> tuple[FloatN, FloatN, npt.NDArray[np.integer]]:
    """Mean score, mean label and rows of each bin; bins hold equally many rows, and equal scores share one."""
    score = score_N.astype(np.float64)
    edges = np.unique(np.quantile(score, np.arange(1, bins) / bins, method="lower"))
    bin_N = np.searchsorted(edges, score, side="right")
    rows = np.bincount(bin_N, minlength=len(edges) + 1)
    used = rows > 0
    mean_score = np.bincount(bin_N, score, len(edges) + 1)[used] / rows[used]
    mean_label = np.bincount(bin_N, label_N.astype(np.float64), len(edges) + 1)[used] / rows[used]
    return mean_score, mean_label, rows[used]


def expected_calibration_error(label_N: FloatN, score_N: FloatN) -> float:
    """Mean over rows of |mean score − mean label| of the row's bin, in 20 bins of equally many rows."""
    mean_score, mean_label, rows = reliability(label_N, score_N)
    return float(np.average(np.abs(mean_score - mean_label), weights=rows))


def grouped_auc(label_N: FloatN, score_N: FloatN, group_N: npt.ArrayLike) -> float | None:
    """Mean of the AUCs within groups, weighted by rows; groups with one class only are left out (DIN, KDD 2018).

    Rows without a group (None) are left out too.
    """
    frame = pl.DataFrame({"label": label_N.astype(np.float64), "score": score_N, "group": group_N}).drop_nulls("group")
    ranks = pl.col("score").rank("average").over("group")
    positives, rows = pl.col("label").sum(), pl.len()
    groups = (
        frame.with_columns(rank=ranks)
        .group_by("group")
        .agg(rows=rows, positives=positives, ranks=(pl.col("rank") * pl.col("label")).sum())
        .with_columns(negatives=pl.col("rows") - pl.col("positives"))
        .filter((pl.col("positives") > 0) & (pl.col("negatives") > 0))
    )
    if groups.is_empty():
        return None
    wins = groups["ranks"] - groups["positives"] * (groups["positives"] + 1) / 2
    return float(np.average(wins / (groups["positives"] * groups["negatives"]), weights=groups["rows"]))


def score_metrics(label_N: FloatN, score_N: FloatN, group_N: npt.ArrayLike | None = None) -> dict[str, float | None]:
    """All of the above by the names that results, reports and the registry use."""
    return {
        "auc": auc(label_N, score_N),
        "pr_auc": pr_auc(label_N, score_N),
        "logloss": logloss(label_N, score_N),
        "ne": normalized_entropy(label_N, score_N),
        "brier": brier(label_N, score_N),
        "calibration": calibration(label_N, score_N),
        "ece": expected_calibration_error(label_N, score_N),
        "gauc": None if group_N is None else grouped_auc(label_N, score_N, group_N),
    }


def _both_classes(label_N: FloatN) -> bool:
    return bool(len(label_N)) and bool(label_N.min() != label_N.max())


def binned_auc(
    negatives_K: npt.NDArray[np.integer], positives_K: npt.NDArray[np.integer], score_K: FloatN
) -> float | None:
    """AUC of rows that are given as counts by bin, rows of a bin having its score; None unless both classes occur."""
    order = np.argsort(score_K, kind="stable")
    first = np.unique(score_K[order], return_index=True)[1]
    negatives = np.add.reduceat(negatives_K[order].astype(np.float64), first)
    positives = np.add.reduceat(positives_K[order].astype(np.float64), first)
    pairs = negatives.sum() * positives.sum()
    if not pairs:
        return None
    below = np.cumsum(negatives) - negatives
    return float(((below + negatives / 2) * positives).sum() / pairs)


def psi(expected_K: npt.NDArray[np.integer], found_K: npt.NDArray[np.integer]) -> float:
    """Population stability index Σ (q − p) · ln(q / p) of two counts over the same bins, smoothed by half a row."""
    p_K = (expected_K + 0.5) / (expected_K + 0.5).sum()
    q_K = (found_K + 0.5) / (found_K + 0.5).sum()
    return float(((q_K - p_K) * np.log(q_K / p_K)).sum())
