"""What makes a model's scores probabilities: a rising curve, fitted on rows that training has not learned from.

calibration.json    {"curve": {"kind": …, and its numbers}, "fitted": {"split", "rows", "sampling_rate"}}

Legend: N rows, K knots.
"""

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from features.errors import InputError
from features.validation import Frozen, validate

CALIBRATION_FILE = "calibration.json"
Kind = Literal["none", "temperature", "platt", "isotonic"]
ScoreN = npt.NDArray[np.float32]
DoubleN = npt.NDArray[np.float64]
_NEXT = 2.0**-24  # to 1 in fp32

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0.0)]
Share = Annotated[float, Field(strict=True, ge=0.0, le=1.0)]


class Unscorable(InputError):
    """Rows have no score: their values are finite, and too large for the network's fp32. `row` is the first."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row}: its values are too large to be scored")
        self.row = row


def logit(score_N: npt.NDArray[np.floating]) -> DoubleN:
    """log(p / (1 − p)) [N] in fp64; what is nearer to 0 or 1 than 6e-8, where fp32 ends next to 1, counts as that."""
    score = np.clip(score_N.astype(np.float64), _NEXT, 1 - _NEXT)
    return np.log(score) - np.log1p(-score)


def sigmoid(logit_N: DoubleN) -> DoubleN:
    """1 / (1 + exp(−logit)) [N] in fp64, without overflow."""
    return np.exp(-np.logaddexp(0.0, -logit_N))


class Same(Frozen):
    """No curve: the score as it is."""

    kind: Literal["none"]

    def of(self, score_N: DoubleN) -> DoubleN:
        return score_N


class Temperature(Frozen):
    """σ(logit / T) (Guo et al., arXiv 1706.04599)."""

    kind: Literal["temperature"]
    temperature: Positive

    def of(self, score_N: DoubleN) -> DoubleN:
        return sigmoid(logit(score_N) / self.temperature)


class Platt(Frozen):
    """σ(slope · logit + shift) (Platt 1999)."""

    kind: Literal["platt"]
    slope: Positive
    shift: Number

    def of(self, score_N: DoubleN) -> DoubleN:
        return sigmoid(self.slope * logit(score_N) + self.shift)


class Isotonic(Frozen):
    """Straight lines between K knots, level beyond the first and last (Zadrozny and Elkan, KDD 2002)."""

    kind: Literal["isotonic"]
    scores: Annotated[tuple[Share, ...], Field(min_length=1)]
    values: Annotated[tuple[Share, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if len(self.scores) != len(self.values):
            raise ValueError(f"{len(self.scores)} scores and {len(self.values)} values")
        if not all(left < right for left, right in pairwise(self.scores)):
            raise ValueError("scores do not ascend")
        if not all(left <= right for left, right in pairwise(self.values)):
            raise ValueError("values fall")
        return self

    def of(self, score_N: DoubleN) -> DoubleN:
        value_N: DoubleN = np.interp(score_N, self.scores, self.values)
        return value_N


class Fitted(Frozen):
    """Where a curve comes from: the rows, and the kept share of negatives that their scores were corrected for."""

    split: str
    rows: Annotated[int, Field(ge=1)]
    sampling_rate: Positive


class Calibration(Frozen):
    """A curve over a bundle's scores, the last step to the one that is served; `apply` it once, to no other scores.

    Rankings order by the score before it, since a curve may have level parts.
    """

    curve: Annotated[Same | Temperature | Platt | Isotonic, Field(discriminator="kind")]
    fitted: Fitted | None = None

    @property
    def kind(self) -> Kind:
        return self.curve.kind

    def apply(self, score_N: ScoreN) -> ScoreN:
        """Calibrated scores [N] in fp32 of uncalibrated ones; without a curve those themselves.

        Raises:
            Unscorable: a score is NaN.
            ValueError: a score is no number from 0 to 1; names the first.
        """
        bad_N = ~((score_N >= 0) & (score_N <= 1))  # NaN is
        if bad_N.any():
            first = int(np.argmax(bad_N))
            if np.isnan(score_N[first]):
                raise Unscorable(first)
            raise ValueError(f"score {score_N[first]} of row {first} is no probability")
        if self.kind == "none":
            return score_N
        return self.curve.of(score_N.astype(np.float64)).astype(np.float32)

    def require_fits(self, sampling_rate: float, bundle: str) -> None:
        """InputError unless the curve, if any, is over scores that were corrected for this sampling rate."""
        if self.kind == "none":
            return
        place = f"bundle {bundle}: {CALIBRATION_FILE}"
        if self.fitted is None:
            raise InputError(f"{place} does not say what it was fitted on: fitted is missing")
        if self.fitted.sampling_rate != sampling_rate:
            raise InputError(
                f"{place} was fitted on scores of sampling rate {self.fitted.sampling_rate}, and the bundle's is "
                f"{sampling_rate}"
            )

    @classmethod
    def from_plain(cls, data: Any, sampling_rate: float, bundle: str) -> "Calibration":
        """What calibration.json holds; InputError names the bundle and the rule."""
        calibration = validate(cls, data, f"bundle {bundle}: {CALIBRATION_FILE}")
        calibration.require_fits(sampling_rate, bundle)
        return calibration


UNCALIBRATED = Calibration(curve=Same(kind="none"))
