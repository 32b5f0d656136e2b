"""Golden rows: synthetic rows whose scores a bundle must reproduce wherever it is loaded.

Both steps to a score are held apart, since a steep calibration would make much of another CPU's rounding: the rows'
uncalibrated scores, and what the calibration makes of those on record.
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from features.columns import canonical
from features.encoders import Identity, LogBucket, Quantile, Scale, Vocabulary
from features.errors import InputError
from features.fields import DateField, ListField, NumericField
from features.pipeline import FittedField
from features.times import from_seconds
from serving.calibration import ScoreN
from serving.scorer import Scorer

GOLDEN_FILE = "golden.json"
ROWS = 16
TOLERANCE = 1e-5  # another CPU sums in another order; a wrong table, vocabulary or field order is off by far more
_SINCE, _UNTIL = 1.5e9, 1.8e9  # seconds: the years 2017 to 2027

Columns = dict[str, list[Any]]


def make_golden(scorer: Scorer, seed: int = 0) -> dict[str, Any]:
    """Rows drawn from what the encoders were fitted to (no person's data), and their scores.

    Columns that hold nothing but times are seconds since 1970. Of managed fields, whose known values nobody has kept,
    `ids` says which ids the rows have once they are encoded: missing, what the pipeline makes of a text never seen, and
    known ones.
    """
    random = np.random.default_rng(seed)
    columns = {field.name: _draw(field, random) for field in _served(scorer)}
    own = set(columns)
    for date in _dates(scorer):
        if date.from_ in own:
            columns[date.from_] = _only_times(columns[date.from_], date)
        elif date.from_ not in columns:
            columns[date.from_] = [None, *random.uniform(_SINCE, _UNTIL, ROWS - 1).round().tolist()]
    golden = {"rows": columns, "ids": {name: _known_ids(scorer, name, random) for name in scorer.pipeline.managed}}
    score_N = scorer.uncalibrated(golden_encoded(scorer, golden))
    return {**golden, "uncalibrated": score_N.tolist(), "scores": scorer.calibration.apply(score_N).tolist()}


def check_golden(scorer: Scorer, golden: Any, bundle: str) -> None:
    """InputError unless every golden row gets its score to 1e-5."""
    recorded_N = recorded(golden)
    require_near(scorer.uncalibrated(golden_encoded(scorer, golden)), recorded_N, "scores", bundle)
    score_N = np.asarray(golden["scores"], np.float32)
    require_near(scorer.calibration.apply(recorded_N), score_N, "is calibrated", bundle)


def recorded(golden: Any) -> ScoreN:
    """The uncalibrated scores on record; older bundles do not calibrate."""
    return np.asarray(golden.get("uncalibrated", golden["scores"]), np.float32)


def require_near(found_N: ScoreN, recorded_N: ScoreN, what: str, bundle: str, tolerance: float = TOLERANCE) -> None:
    """InputError that names the worst row unless all scores [N] are near those on record."""
    off_N = np.abs(found_N - recorded_N)
    if not np.all(off_N <= tolerance):
        worst = int(np.argmax(np.where(np.isnan(off_N), np.inf, off_N)))
        raise InputError(f"bundle {bundle} is refused: golden row {worst} {what} {off_N[worst]:.2e} off its record")


def _served(scorer: Scorer) -> list[FittedField]:
    """The fields that clients send."""
    inputs = scorer.pipeline.inputs
    return [f for f in inputs if not isinstance(f.spec, DateField) and not getattr(f.spec, "training_only", None)]


def _dates(scorer: Scorer) -> list[DateField]:
    return [field.spec for field in scorer.pipeline.fields if isinstance(field.spec, DateField)]


def _known_ids(scorer: Scorer, name: str, random: np.random.Generator) -> list[Any]:
    """For each row the field's ids, drawn from its map; None where those of the raw row stay, in the first two rows."""
    field = next(field for field in scorer.pipeline.fields if field.name == name)
    ids_K = scorer.id_maps[field.owner].ids_K
    if not len(ids_K):
        return [None] * ROWS
    drawn = [random.choice(ids_K, 1 + i % 3 if field.is_list else 1).tolist() for i in range(ROWS - 2)]
    return [None, None, *(ids if field.is_list else ids[0] for ids in drawn)]


def golden_rows(scorer: Scorer, golden: Mapping[str, Any]) -> Columns:
    """The raw rows, as the pipeline takes them."""
    fields = {field.name for field in _served(scorer)}
    only_times = {date.from_ for date in _dates(scorer)} - fields
    return {name: _times(values) if name in only_times else values for name, values in golden["rows"].items()}


def golden_encoded(scorer: Scorer, golden: Mapping[str, Any]) -> pa.Table:
    """The rows encoded, those of managed fields with the ids on record."""
    encoded = scorer.pipeline.encode(golden_rows(scorer, golden))
    for name, given in golden.get("ids", {}).items():  # older bundles have none
        own = encoded[name].to_pylist()
        ids = [mine if id_ is None else id_ for mine, id_ in zip(own, given, strict=True)]
        encoded = encoded.set_column(encoded.column_names.index(name), name, pa.array(ids, encoded[name].type))
    return encoded


def _times(seconds: Iterable[float | None]) -> list[datetime | None]:
    return [None if second is None else from_seconds(second) for second in seconds]


def _only_times(values: list[Any], date: DateField) -> list[Any]:
    """A field's values without those that the date field which reads them as well cannot read."""
    bad_N = canonical(pa.table({date.from_: pa.array(values)}), date).bad_N
    return values if bad_N is None else [None if bad else v for bad, v in zip(bad_N.tolist(), values, strict=True)]


def _draw(field: FittedField, random: np.random.Generator) -> list[Any]:
    """Known values, with a missing one first and, but for numbers, a never-seen one second."""
    if isinstance(field.spec, NumericField):
        draw = _number(field, random)
        return [None, *(draw() for _ in range(ROWS - 1))]
    unseen = str(field.encoder.buckets) if isinstance(field.encoder, Identity) else "golden never seen"
    known = [[_value(field, random) for _ in range(1 + i % 3)] for i in range(ROWS - 2)]
    if isinstance(field.spec, ListField):
        return [None, [unseen], *known]
    return [None, unseen, *(values[0] for values in known)]


def _number(field: FittedField, random: np.random.Generator) -> Callable[[], float]:
    """Draws numbers from all over the encoder's buckets, or from around the mean of its values."""
    encoder = field.encoder
    if isinstance(encoder, Quantile):
        edges = encoder.boundaries if len(encoder.boundaries) else np.zeros(1)
        return lambda: float(random.choice(edges)) + float(random.choice([-0.5, 0.0, 0.5]))
    if isinstance(encoder, LogBucket):
        return lambda: float(np.exp(random.uniform(0.0, 12.0)).round()) - 3.0
    assert isinstance(encoder, Scale)  # the schema has no other for numbers
    return lambda: encoder.shift + encoder.scale * round(float(random.uniform(-1.0, 1.0)), 3)


def _value(field: FittedField, random: np.random.Generator) -> str:
    if isinstance(field.encoder, Vocabulary) and len(field.encoder.values):
        return str(field.encoder.values[int(random.integers(len(field.encoder.values)))].as_py())
    if isinstance(field.encoder, Identity):
        return str(random.integers(field.encoder.buckets))
    return f"golden {random.integers(1_000_000)}"
