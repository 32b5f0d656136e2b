"""Statistics of scored rows. Labels are 0 or 1, scores probabilities; None where a metric is not defined.

Each metric that scikit-learn has agrees with it to 1e-9. Labels and scores that are neither are a ValueError that names
the first such row. Scores stay as they are, fp32 or fp64, and are summed as fp64, a million rows at a time.

Legend: N rows, K bins.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from features.metrics_curves import CHUNK, EXACT_ROWS, Area, Counts, count_scores, precision_recall_area, roc_area
from features.metrics_groups import TOP, Rankings, codes_of, rank_groups
from features.metrics_input import BoolN, FloatN, clicks_of, require_numbers, require_probabilities, require_rows

ECE_BINS = 20


def auc(label_N: npt.ArrayLike, score_N: FloatN) -> float | None:
    """Area under the ROC curve of any finite numbers; None unless both classes occur."""
    return roc_area(_counted(label_N, score_N, EXACT_ROWS)).value


def pr_auc(label_N: FloatN, score_N: FloatN) -> float | None:
    """Average precision (the step-wise area under the precision-recall curve); None unless both classes occur."""
    return precision_recall_area(_counted(label_N, score_N, EXACT_ROWS)).value


def areas(label_N: FloatN, score_N: FloatN, exact_rows: int = EXACT_ROWS) -> tuple[Area, Area]:
    """`auc` and `pr_auc` from one sort; above `exact_rows` from bins, with how far the exact areas can be from that."""
    counts = _counted(label_N, score_N, exact_rows)
    return roc_area(counts), precision_recall_area(counts)


def _counted(label_N: npt.ArrayLike, score_N: FloatN, exact_rows: int) -> Counts:
    click_N = clicks_of(label_N, score_N)
    require_numbers(score_N)
    return count_scores(click_N, score_N, exact_rows)


def auc_standard_error(auc: float, positives: int, negatives: int) -> float:
    """Standard error of an AUC over independent rows (Hanley and McNeil, Radiology 143, 1982)."""
    one_positive, one_negative = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    spread = (positives - 1) * (one_positive - auc**2) + (negatives - 1) * (one_negative - auc**2)
    return math.sqrt((auc * (1 - auc) + spread) / (positives * negatives))


def logloss(label_N: FloatN, score_N: FloatN, weight_N: FloatN | None = None) -> float:
    """Mean negative log-likelihood, in nats; ValueError without rows, or where all weights are 0."""
    return _mean(log_losses, label_N, score_N, weight_N)


def log_losses(click_N: BoolN, score_N: FloatN) -> npt.NDArray[np.float64]:
    """Negative log-likelihood of each row, in nats.

    As scikit-learn: a score is kept away from 0 and 1 by its own precision, since it would be infinitely wrong there.
    """
    score_N = score_N if np.issubdtype(score_N.dtype, np.floating) else score_N.astype(np.float64)
    nearest = float(np.finfo(score_N.dtype).eps)
    score = np.clip(score_N.astype(np.float64), nearest, 1 - nearest)
    return -np.log(np.where(click_N, score, 1 - score))


def normalized_entropy(label_N: FloatN, score_N: FloatN) -> float | None:
    """Log loss over that of always predicting the base rate (He et al., 2014): below 1 is better than that."""
    clicks = int(clicks_of(label_N, score_N).sum())
    if clicks in (0, len(label_N)):
        return None
    rate = clicks / len(label_N)
    return logloss(label_N, score_N) / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))


def relative_information_gain(label_N: FloatN, score_N: FloatN) -> float | None:
    """Share of the base rate's log loss that the scores take away, 1 − normalized entropy (Yi et al., 2013)."""
    entropy = normalized_entropy(label_N, score_N)
    return None if entropy is None else 1 - entropy


def brier(label_N: FloatN, score_N: FloatN) -> float:
    """Mean squared difference between score and label; ValueError without rows."""
    return _mean(squared_errors, label_N, score_N)


def squared_errors(click_N: BoolN, score_N: FloatN) -> npt.NDArray[np.float64]:
    """Squared difference between score and label of each row."""
    return (score_N.astype(np.float64) - click_N) ** 2


def calibration(label_N: FloatN, score_N: FloatN) -> float | None:
    """Predicted clicks over observed clicks; None without a click."""
    clicks = int(clicks_of(label_N, score_N).sum())
    require_probabilities(score_N)
    return float(np.sum(score_N, dtype=np.float64)) / clicks if clicks else None


def reliability(
    label_N: FloatN, score_N: FloatN, bins: int = ECE_BINS
) -> tuple[FloatN, FloatN, npt.NDArray[np.integer]]:
    """Mean score, mean label and rows of each bin; bins hold equally many rows, and equal scores share one.

    ValueError without rows.
    """
    click_N = clicks_of(label_N, score_N)
    require_rows(score_N)
    require_probabilities(score_N)
    edges = reliability_edges(score_N, bins)
    sums = np.zeros((3, len(edges) + 1))
    for chunk in _chunks(len(score_N)):
        bin_N = np.searchsorted(edges, score_N[chunk], side="right")
        for total, weight_N in zip(sums, (score_N[chunk], click_N[chunk], None), strict=True):
            total += np.bincount(bin_N, weight_N, len(edges) + 1)
    score_K, label_K, rows_K = sums[:, sums[2] > 0]
    return score_K / rows_K, label_K / rows_K, rows_K.astype(np.int64)


def reliability_edges(score_N: FloatN, bins: int = ECE_BINS) -> FloatN:
    """The scores at which `reliability`'s bins begin, but the first."""
    return np.unique(np.quantile(score_N, np.arange(1, bins) / bins, method="lower"))


def expected_calibration_error(label_N: FloatN, score_N: FloatN) -> float:
    """Mean over rows of |mean score − mean label| of the row's bin, in 20 bins of equally many rows."""
    mean_score, mean_label, rows = reliability(label_N, score_N)
    return float(np.average(np.abs(mean_score - mean_label), weights=rows))


def grouped_auc(label_N: FloatN, score_N: FloatN, group_N: npt.ArrayLike) -> float | None:
    """Mean of the AUCs within groups, weighted by rows; groups with one class only are left out (DIN, KDD 2018).

    Rows without a group (None) are left out too.
    """
    return rankings(label_N, score_N, group_N).means()["gauc"]


def rankings(label_N: FloatN, score_N: FloatN, group_N: npt.ArrayLike, top: int = TOP) -> Rankings:
    """AUC, NDCG, reciprocal rank and recall of each group, groups in the order of their first rows."""
    click_N = clicks_of(label_N, score_N)
    require_numbers(score_N)
    return rank_groups(click_N, score_N, *codes_of(group_N), top)


def score_metrics(
    label_N: FloatN, score_N: FloatN, group_N: npt.ArrayLike | None = None, ranking_N: FloatN | None = None
) -> dict[str, float | None]:
    """All of the above by the names that results, reports and the registry use; ValueError without rows.

    NDCG, reciprocal rank and recall are means over the groups with a click; "coverage" is the share of rows in groups
    with both classes, those of which grouped AUC speaks.

    Args:
        score_N: probabilities: log loss, entropy, Brier score and calibration are theirs.
        ranking_N: what orders the rows, for areas under curves and rankings; the probabilities unless given. A
            calibration by steps makes ties among probabilities that the order has not.
    """
    require_rows(score_N)
    ranking_N = score_N if ranking_N is None else ranking_N
    roc, precision_recall = areas(label_N, ranking_N)
    entropy = normalized_entropy(label_N, score_N)
    grouped = None if group_N is None else rankings(label_N, ranking_N, group_N)
    found = {} if grouped is None else grouped.means()
    return {
        "auc": roc.value,
        "pr_auc": precision_recall.value,
        "logloss": logloss(label_N, score_N),
        "ne": entropy,
        "brier": brier(label_N, score_N),
        "calibration": calibration(label_N, score_N),
        "ece": expected_calibration_error(label_N, score_N),
        "gauc": found.get("gauc"),
        "rig": None if entropy is None else 1 - entropy,
        **{name: found.get(name) for name in (f"ndcg@{TOP}", "mrr", f"recall@{TOP}")},
        "coverage": None if grouped is None else float(grouped.rows_G[grouped.has_both_G].sum()) / len(score_N),
    }


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, rows, CHUNK))


def _mean(
    per_row: Callable[[BoolN, FloatN], FloatN], label_N: FloatN, score_N: FloatN, weight_N: FloatN | None = None
) -> float:
    click_N = clicks_of(label_N, score_N)
    require_rows(score_N)
    require_probabilities(score_N)
    total = weight = 0.0
    for chunk in _chunks(len(score_N)):
        value_N = per_row(click_N[chunk], score_N[chunk])
        total += float(value_N.sum() if weight_N is None else value_N @ weight_N[chunk])
        weight += len(value_N) if weight_N is None else float(weight_N[chunk].sum(dtype=np.float64))
    if weight == 0:
        raise ValueError(f"the weights of all {len(score_N)} rows are 0: there is nothing to measure")
    return total / weight


def binned_auc(
    negatives_K: npt.NDArray[np.integer], positives_K: npt.NDArray[np.integer], score_K: FloatN
) -> float | None:
    """AUC of rows that are given as counts by bin, rows of a bin having its score; None unless both classes occur."""
    order = np.argsort(score_K, kind="stable")
    first = np.unique(score_K[order], return_index=True)[1]
    positives, negatives = (np.add.reduceat(count_K[order], first) for count_K in (positives_K, negatives_K))
    return roc_area(Counts(positives, negatives)).value


def psi(expected_K: npt.NDArray[np.integer], found_K: npt.NDArray[np.integer] | FloatN) -> float:
    """Population stability index Σ (q − p) · ln(q / p) of two counts over the same bins, smoothed by half a row."""
    p_K = (expected_K + 0.5) / (expected_K + 0.5).sum()
    q_K = (found_K + 0.5) / (found_K + 0.5).sum()
    return float(((q_K - p_K) * np.log(q_K / p_K)).sum())
