"""Fitting calibrations: on uncalibrated scores of rows that training has not learned from.

Legend: N rows, G cells of the logit.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from features.dataset import LABEL, PreparedDataset, weights_of
from features.errors import InputError
from serving.calibration import UNCALIBRATED, Calibration, Fitted, Isotonic, Kind, Platt, Temperature, logit, sigmoid
from serving.scorer import Scorer

FloatN = npt.NDArray[np.floating]
CELL = 0.05  # of the logit, between neighbouring knots: no step is so steep that rounding counts
_LEAST_SPREAD = 1e-6  # of logits that are not all the same but for rounding


def calibrate(method: Kind, scorer: Scorer, dataset: PreparedDataset, split: str = "valid") -> Calibration:
    """Fit the last step of a scorer on a split of its data set, whose negatives were never dropped after they arrived.

    Of those that arrived as a share (`already_sampled`), each stands for 1 / share. Row weights, which are of the
    training loss, do not count, as they do not in metrics.
    """
    if method == "none":
        return UNCALIBRATED
    table = dataset.split(split)
    label_N = table[LABEL].to_numpy()
    weight_N = weights_of(dataset.schema, label_N)
    score_N = scorer.uncalibrated(table)
    return fit_calibration(method, score_N, label_N, weight_N, split=split, sampling_rate=scorer.sampling_rate)


def require_calibratable(method: Kind, valid: pa.Table | None) -> None:
    """InputError where `method` has no rows to be fitted on; None are those of days."""
    if method == "none":
        return
    if valid is None:
        raise InputError(f"calibration.method {method} needs a data set with a validation split; this one is a day")
    _require_both_classes(method, valid[LABEL].to_numpy(), "valid")


def fit_calibration(
    method: Kind,
    score_N: FloatN,
    label_N: FloatN,
    weight_N: FloatN | None = None,
    *,
    split: str = "valid",
    sampling_rate: float = 1.0,
) -> Calibration:
    """The curve of a kind that makes scores most likely, without regularization.

    Args:
        method: `none` gives no curve.
        score_N: uncalibrated.
        label_N: 0 or 1.
        weight_N: how many rows each stands for, 0 or more; by default 1.
        split: where the rows are from, for the record.
        sampling_rate: that the scores were corrected for, for the record.

    Returns:
        The calibration. It has no curve where a line over the logits would not rise: clicks do not increase with the
        scores, or these are all the same.

    Raises:
        InputError: the rows are of one class only.
    """
    if method == "none":
        return UNCALIBRATED
    weight_N = np.ones(len(label_N)) if weight_N is None else weight_N.astype(np.float64)
    score_N, label_N, weight_N = (part_N[weight_N > 0] for part_N in (score_N, label_N, weight_N))
    _require_both_classes(method, label_N, split)
    fitted = Fitted(split=split, rows=len(label_N), sampling_rate=sampling_rate)
    if method == "isotonic":
        return Calibration(curve=_isotonic(score_N, label_N, weight_N), fitted=fitted)
    slope, shift = _line(logit(score_N), label_N, weight_N, shifted=method == "platt")
    if slope <= 0:
        return UNCALIBRATED
    if method == "platt":
        return Calibration(curve=Platt(kind="platt", slope=slope, shift=shift), fitted=fitted)
    return Calibration(curve=Temperature(kind="temperature", temperature=1 / slope), fitted=fitted)


def _require_both_classes(method: Kind, label_N: FloatN, split: str) -> None:
    if not len(label_N) or label_N.min() == label_N.max():
        raise InputError(f"calibration.method {method} needs both classes in the {split} split, which has one only")


def _line(logit_N: FloatN, label_N: FloatN, weight_N: FloatN, *, shifted: bool) -> tuple[float, float]:
    """Slope and shift (0 unless `shifted`) of the most likely line over logits; slope 0 where these are all the same.

    Labels are what Platt (1999) has in their place, (clicks + 1) / (clicks + 2) and 1 / (others + 2), so that the line
    is finite even where a score parts the classes.
    """
    if np.ptp(logit_N) < _LEAST_SPREAD:
        return 0.0, 0.0
    centre = float(np.mean(logit_N)) if shifted else 0.0
    scale = float(np.sqrt(np.mean((logit_N - centre) ** 2)))  # of about 1, for the solver
    x_N = (logit_N - centre) / scale
    clicks, others = float(weight_N[label_N > 0].sum()), float(weight_N[label_N <= 0].sum())
    target_N = np.where(label_N > 0, (clicks + 1) / (clicks + 2), 1 / (others + 2))
    model = LogisticRegression(C=np.inf, fit_intercept=shifted, solver="newton-cholesky", tol=1e-10)
    model.fit(
        np.concatenate([x_N, x_N])[:, None],
        np.repeat([1, 0], len(x_N)),  # a share of each row is a click
        sample_weight=np.concatenate([weight_N * target_N, weight_N * (1 - target_N)]),
    )
    slope = float(model.coef_[0, 0]) / scale
    return slope, float(model.intercept_[0]) - slope * centre if shifted else 0.0


def _isotonic(score_N: FloatN, label_N: FloatN, weight_N: FloatN) -> Isotonic:
    """Isotonic regression over cells of the logit, with their centres as knots."""
    cell_G, index_N = np.unique(np.round(logit(score_N) / CELL), return_inverse=True)
    weight_G = np.bincount(index_N, weight_N)
    rate_G = np.bincount(index_N, weight_N * label_N) / weight_G
    model = IsotonicRegression(y_min=0.0, y_max=1.0).fit(cell_G, rate_G, sample_weight=weight_G)
    low, high = _bounds(np.asarray(model.predict(cell_G)), weight_G)
    return Isotonic(
        kind="isotonic",
        scores=tuple(sigmoid(model.X_thresholds_ * CELL).tolist()),
        values=tuple(np.clip(model.y_thresholds_, low, high).tolist()),
    )


def _bounds(value_G: FloatN, weight_G: npt.NDArray[np.number]) -> tuple[float, float]:
    """What stands for 0 and 1, which no number of rows shows: Laplace's 1 / (rows + 2), or the next value if nearer."""
    none_G, all_G = value_G <= 0, value_G >= 1
    inner = value_G[~none_G & ~all_G]
    low, high = 1 / (weight_G[none_G].sum() + 2), 1 - 1 / (weight_G[all_G].sum() + 2)
    return float(min([low, *inner])), float(max([high, *inner]))
