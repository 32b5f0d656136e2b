"""Drift: rows that were served, or any raw rows, against those that a model was trained on (`masknet drift`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.errors import InputError
from features.fields import CrossField, DateField
from features.pipeline import FittedField
from features.schema import Schema
from features.sources import find_sources
from features.units import read_source
from serving.bundle import Bundle
from serving.monitoring.chance import FEWEST, Shift, shift_of
from serving.monitoring.drift_counts import RowCounts
from serving.monitoring.reference import Reference, load_reference

ALARM = 0.001  # a field is said to have drifted only if chance does this more rarely
_DAY = 86_400.0
_PERIODS = {"hour": _DAY, "weekday": 7 * _DAY, "day": 31 * _DAY, "month": 365 * _DAY}

Verdict = Literal["drifted", "stable", "not judged"]
CountG = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Drifted:
    """What became of a field, or of the score: shares [G] of its groups in training and now, and the shift.

    Groups are missing, never seen, the most frequent bins of training, all others; of the score its bins.
    """

    name: str
    shift: Shift
    verdict: Verdict
    expected_G: CountG
    found_G: CountG
    why: str = ""

    @property
    def shares_2G(self) -> npt.NDArray[np.float64]:
        """The shares [2, G] in training and now."""
        return np.stack([counts / counts.sum() for counts in (self.expected_G, self.found_G)])


@dataclass(frozen=True)
class DriftResult:
    """The fields in the order of the pipeline, the score, and which rows they are of.

    `times` are those of the first and last answer in the log, in seconds since 1970; `versions` the log's rows by the
    version that answered.
    """

    name: str
    version: str
    source: str
    threshold: float
    rows: int
    times: tuple[float, float] | None
    versions: Mapping[str, int]
    fields: tuple[Drifted, ...]
    score: Drifted
    scores_of: Literal["as served", "by the model"]

    @property
    def drifted(self) -> tuple[str, ...]:
        """What has drifted: fields by their names, and "score"."""
        return tuple(one.name for one in (*self.fields, self.score) if one.verdict == "drifted")


def measure_drift(bundle: Bundle, version: str, sources: list[str], threshold: float) -> DriftResult:
    """Compare rows with a model's reference.

    Rows of shadow scorings stand in a log a second time and are left out. Scores are those that this version has
    served, as they stand in the log; where there are none, the model scores the rows.

    Args:
        bundle: the model, whose pipeline encodes the rows.
        version: what the log calls it.
        sources: files, folders or globs of a prediction log, or of raw rows.
        threshold: how far the stability index has to be above what chance leaves.

    Raises:
        InputError: the bundle has no reference, or the rows cannot be read, or are of too few users or requests.
    """
    reference = load_reference(bundle.path, bundle.pipeline)
    counts = RowCounts(bundle, version, reference)
    _each(bundle.schema, sources, counts.add)
    place = ", ".join(sources)
    _require_enough(counts, place)
    served = bool(counts.served_RG.any())
    if not served:
        _each(bundle.schema, sources, counts.add_scores)
    score_RG = counts.served_RG if served else counts.scored_RG
    return DriftResult(
        name=bundle.name,
        version=version,
        source=place,
        threshold=threshold,
        rows=counts.rows,
        times=counts.times,
        versions=dict(counts.versions),
        fields=tuple(_field(field, bundle, reference, counts, threshold) for field in counts.fields),
        score=_judged("score", reference.score.counts, score_RG, threshold),
        scores_of="as served" if served else "by the model",
    )


def _each(schema: Schema, sources: list[str], use: Callable[[pa.Table], None]) -> None:
    """Hand on the rows, a chunk at a time; InputError names the file and what cannot be read in it."""
    for source in find_sources(sources):
        for chunk in read_source(source, schema.csv):
            if chunk.bad_rows:
                bad = chunk.bad_rows[0]
                raise InputError(f"input {bad.file}, line {bad.line}: {bad.reason}")
            try:
                use(chunk.table)
            except InputError as error:
                raise InputError(f"input {source.path}: {error}") from None


def _require_enough(counts: RowCounts, place: str) -> None:
    found_RG = counts.found[counts.fields[0].name]
    parts = int(np.count_nonzero(found_RG.sum(1)))
    if parts < FEWEST:
        raise InputError(
            f"input {place}: {counts.rows} rows of {parts} users or requests are too few to tell drift from chance; "
            f"{FEWEST} at least are needed"
        )


def _field(field: FittedField, bundle: Bundle, reference: Reference, counts: RowCounts, threshold: float) -> Drifted:
    found = _judged(field.name, reference.fields[field.name].counts, counts.found[field.name], threshold)
    for date in _dates(field, bundle):
        low, high = counts.ranges[date.from_]
        if high - low < _PERIODS[date.part]:
            hours, period = max(0.0, high - low) / 3600, _PERIODS[date.part] / 3600
            return replace(found, verdict="not judged", why=f"the rows cover {hours:,.1f} of {period:,.0f} hours")
    return found


def _dates(field: FittedField, bundle: Bundle) -> list[DateField]:
    """The date fields that a field is, or is crossed of: their values come round again."""
    parts = field.spec.of if isinstance(field.spec, CrossField) else (field.name,)
    return [f.spec for f in bundle.pipeline.fields if f.name in parts and isinstance(f.spec, DateField)]


def _judged(name: str, expected: tuple[int, ...], found_RG: CountG, threshold: float) -> Drifted:
    expected_G, found_G = np.array(expected), found_RG.sum(0)
    shift = shift_of(expected_G, found_RG)
    drifted = shift.beyond_chance > threshold and shift.p < ALARM
    return Drifted(name, shift, "drifted" if drifted else "stable", expected_G, found_G)
