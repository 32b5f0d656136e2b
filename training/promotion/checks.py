"""The checks that a challenger must pass, as functions of numbers alone.

Legend: N rows, K bins, G clusters of rows, R draws.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from features.metrics import calibration, expected_calibration_error, logloss, reliability_edges
from training.evaluation.clusters import clusters_of, worth
from training.evaluation.intervals import MIN_CLUSTERS
from training.evaluation.results import Comparison, Difference
from training.numbers import number, p_value, signed
from training.promotion.config import PromotionConfig, SliceRule

FloatN = npt.NDArray[np.floating]
_NOT_WORSE = ("logloss", "auc")
_DRAWS, _SHARE = 1000, 0.95  # of what chance does to calibration
_MOST = 3  # times a threshold: what few rows are forgiven at most


@dataclass(frozen=True)
class Check:
    """One rule and what was found.

    Attributes:
        name: what is checked: "logloss", "auc", "calibration", "ece", "rows", or a slice's name.
        passed: whether the rule is kept.
        value: the number it is about; None where it is not defined.
        threshold: what the number, or its p, is held against.
        shown: the value as a person reads it.
        rule: the threshold as a person reads it.
        p: of a difference.
    """

    name: str
    passed: bool
    value: float | None
    threshold: float
    shown: str
    rule: str
    p: float | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.shown}, allowed: {self.rule}"

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def failed(checks: Sequence[Check]) -> list[Check]:
    """Those that were not passed."""
    return [check for check in checks if not check.passed]


def check_rows(rows: int, config: PromotionConfig) -> Check:
    """Enough rows to tell anything: on few of them every model is "not told apart" from every other."""
    rule = f"at least {config.min_rows:,}"
    return Check("rows", rows >= config.min_rows, rows, config.min_rows, f"{rows:,}", rule)


def check_differences(comparison: Comparison, config: PromotionConfig) -> list[Check]:
    """Log loss and AUC of challenger − champion: neither may be worse by more than chance explains.

    Without a test, as there is none on few groups, the difference itself decides: any worse one is refused. One that
    is not defined, as an AUC on rows of one class, is not passed.
    """
    return [_difference(name, comparison.differences.get(name), config.level) for name in _NOT_WORSE]


def _difference(name: str, found: Difference | None, level: float) -> Check:
    rule = f"not worse with p < {level:g}"
    if found is None or found.value is None:
        return Check(name, False, None, level, "is not defined on these rows", rule)
    worse = found.value < 0 if name == "auc" else found.value > 0
    if found.p is None:
        shown = f"{signed(found.value)}, without a test on so few groups"
        return Check(name, not worse, found.value, level, shown, "not worse")
    refused = bool(worse and found.p < level)
    interval = "" if found.low is None else f" ({signed(found.low)} to {signed(found.high)})"
    shown = f"{signed(found.value)}{interval}, p {p_value(found.p)}"
    return Check(name, not refused, found.value, level, shown, rule, found.p)


def check_calibration(
    label_N: FloatN, score_N: FloatN, group_N: npt.ArrayLike | None, config: PromotionConfig, lost: str | None = None
) -> list[Check]:
    """Predicted over observed clicks, and ECE: within the threshold, or what chance does to a calibrated model.

    Chance is forgiven up to three times the threshold: what is further off is refused however few the rows. Where
    negatives are missing from the rows, for the reason `lost`, scores cannot be held against their clicks, and neither
    is judged.
    """
    if lost is not None:
        of = {"calibration": (config.max_calibration_error, "1 ± "), "ece": (config.max_ece, "at most ")}
        return [
            Check(name, True, None, most, f"not judged: {lost}", f"{rule}{most:g}") for name, (most, rule) in of.items()
        ]
    ratio, ece = calibration(label_N, score_N), expected_calibration_error(label_N, score_N)
    error = None if ratio is None else abs(ratio - 1)
    of_ratio, of_ece = by_chance(label_N, score_N, group_N)
    allowed, rule = _allowed(config.max_calibration_error, of_ratio)
    shown = "is not defined without a click" if ratio is None else number(ratio)
    passed = error is not None and error <= allowed
    checks = [Check("calibration", passed, ratio, allowed, shown, f"1 ± {rule}")]
    allowed, rule = _allowed(config.max_ece, of_ece)
    return [*checks, Check("ece", ece <= allowed, ece, allowed, number(ece), f"at most {rule}")]


def _allowed(threshold: float, chance: float) -> tuple[float, str]:
    most = _MOST * threshold
    if min(chance, most) <= threshold:
        return threshold, f"{threshold:g}"
    if chance > most:
        return most, f"{most:g} (chance on so few rows, up to {_MOST} × {threshold:g})"
    return chance, f"{chance:.4f} (chance on so few rows; else {threshold:g})"


def by_chance(label_N: FloatN, score_N: FloatN, group_N: npt.ArrayLike | None) -> tuple[float, float]:
    """|predicted / observed − 1| and ECE that a calibrated model of these scores stays below 19 times in 20.

    By a wild bootstrap of clusters (Cameron, Gelbach and Miller, 2008): each cluster's sum of score − label by bin of
    ECE gets a sign at random. Before that the bin's mean is taken out of it, so that a model's own error is no part of
    the chance. Rows of a group go together, unless these are worth fewer than 8 equal ones: then each row is alone.
    """
    edges = reliability_edges(score_N)
    cluster_N = _clusters(group_N, len(score_N))
    clusters = int(cluster_N.max()) + 1
    cell_N = np.searchsorted(edges, score_N, side="right") * clusters + cluster_N
    cells = (len(edges) + 1) * clusters
    rows_KG = np.bincount(cell_N, minlength=cells).reshape(-1, clusters)
    noise_KG = _centred(np.bincount(cell_N, score_N - label_N, cells).reshape(-1, clusters), rows_KG)
    sign_RG = np.random.default_rng(0).integers(0, 2, (_DRAWS, clusters), dtype=np.int8) * 2.0 - 1.0
    drawn_RK = sign_RG @ noise_KG.T
    ratio_R = np.abs(drawn_RK.sum(axis=1)) / max(float(label_N.sum()), 1.0)
    ece_R = np.abs(drawn_RK).sum(axis=1) / len(score_N)
    return float(np.quantile(ratio_R, _SHARE)), float(np.quantile(ece_R, _SHARE))


def _clusters(group_N: npt.ArrayLike | None, rows: int) -> npt.NDArray[np.integer]:
    """The cluster of each row; of rows by themselves where groups are too few or one of them is nearly all."""
    cluster_N = clusters_of(group_N, rows)
    if worth(np.bincount(cluster_N)) < MIN_CLUSTERS:
        return clusters_of(None, rows)
    return cluster_N


def _centred(gap_KG: npt.NDArray[np.number], rows_KG: npt.NDArray[np.number]) -> FloatN:
    """Gaps without their bin's mean gap per row, as widely spread as about the true mean: × √(m / (m − 1))."""
    rows_K1 = rows_KG.sum(axis=1, keepdims=True)
    mean_K1 = gap_KG.sum(axis=1, keepdims=True) / np.maximum(rows_K1, 1)
    worth_K1 = np.maximum(worth(rows_KG), 1.0)[:, None]
    centred_KG: FloatN = (gap_KG - mean_K1 * rows_KG) * np.sqrt(worth_K1 / np.maximum(worth_K1 - 1, 1.0))
    return centred_KG


def check_slice(
    rule: SliceRule, label_N: FloatN, challenger_N: FloatN, champion_N: FloatN, config: PromotionConfig
) -> Check:
    """Log loss of challenger − champion on the rows of a slice, held against the slice's own threshold.

    It is the rise on these very rows, without a test: what chance does is the threshold's to allow, and slices of
    fewer rows than `min_slice_rows` judge nothing.
    """
    rows, most = len(label_N), rule.max_logloss_increase
    text = f"log loss rises by at most {most:g}"
    if rows < config.min_slice_rows:
        return Check(rule.name, True, None, most, f"not judged: {rows:,} rows", text)
    rise = logloss(label_N, challenger_N) - logloss(label_N, champion_N)
    return Check(rule.name, rise <= most, rise, most, f"log loss {signed(rise)} on {rows:,} rows", text)
