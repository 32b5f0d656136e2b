"""What metrics may be computed of: labels of 0 and 1, scores that are numbers, as many as labels.

Legend: N rows.
"""

import numpy as np
import numpy.typing as npt

FloatN = npt.NDArray[np.floating]
BoolN = npt.NDArray[np.bool_]


def clicks_of(label_N: npt.ArrayLike, score_N: FloatN) -> BoolN:
    """Whether each row is a click; ValueError for a label that is not 0 or 1, or as many scores as labels."""
    label = np.asarray(label_N)
    if label.ndim != 1 or np.shape(score_N) != label.shape:
        raise ValueError(f"{np.shape(score_N)} scores of {label.shape} labels: there must be one of each per row")
    click_N = label == 1
    _refuse(~click_N & (label != 0), label, "a label is 0 or 1")
    return click_N


def require_numbers(score_N: FloatN) -> None:
    """ValueError for a score that is not finite."""
    if len(score_N) and not (np.isfinite(score_N.min()) and np.isfinite(score_N.max())):
        _refuse(~np.isfinite(score_N), score_N, "a score is finite")


def require_probabilities(score_N: FloatN) -> None:
    """ValueError for a score that is no probability."""
    if len(score_N) and not (score_N.min() >= 0 and score_N.max() <= 1):  # both are NaN if a score is
        _refuse(~((score_N >= 0) & (score_N <= 1)), score_N, "a score is a probability, from 0 to 1")


def require_rows(score_N: FloatN) -> None:
    """ValueError without rows, where a metric has no value for that."""
    if len(score_N) == 0:
        raise ValueError("there are no rows to measure")


def _refuse(wrong_N: BoolN, value_N: npt.NDArray[np.generic], rule: str) -> None:
    if wrong_N.any():
        row = int(wrong_N.argmax())
        raise ValueError(f"row {row} has {value_N[row]}: {rule} ({int(wrong_N.sum())} of {len(wrong_N)} rows are not)")
