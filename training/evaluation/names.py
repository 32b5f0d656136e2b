"""What people call the ids and values of an encoded field."""

import calendar
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from features.dataset import SPLITS
from features.encoders import FIRST, DatePart, Hash, Identity, LogBucket, Managed, Quantile, Scale, Vocabulary
from features.fields import CrossField
from features.hashing import hash_text
from features.pipeline import FittedField

Known = Mapping[str, Sequence[str]]  # values of fields whose ids are hashes, by the fields' names


def known_values(profile: Mapping[str, Any]) -> dict[str, list[str]]:
    """The most frequent values of each field in any split, as a prepared data set's profile.json has them."""
    return {
        name: list(dict.fromkeys(value for split in SPLITS for value, _ in (about.get(split) or {}).get("top") or []))
        for name, about in profile["fields"].items()
    }


def hashed_names(field: FittedField, values: Sequence[str]) -> dict[int, str]:
    """Names of the ids that the values have by their hashes; values that share a bucket are named together."""
    if not isinstance(field.encoder, (Hash, Managed)) or isinstance(field.spec, CrossField) or not values:
        return {}
    names: dict[int, str] = {}
    ids = field.encoder.encode(hash_text(pa.array(values, pa.string()))).tolist()
    for id_, value in zip(ids, values, strict=True):
        names[id_] = f"{names[id_]} or {value}" if id_ in names else value
    return names


def value_of(field: FittedField, id_: int) -> str:
    """What the id of a vocabulary, an identity or a date field stands for."""
    encoder, place = field.encoder, id_ - FIRST
    if isinstance(encoder, Vocabulary):
        return str(encoder.values[place].as_py())
    if isinstance(encoder, DatePart):
        names = {"weekday": list(calendar.day_name), "month": list(calendar.month_name)[1:]}.get(encoder.part)
        return names[place] if names else str(place + (encoder.part == "day"))
    assert isinstance(encoder, Identity)  # buckets of numbers have ranges, hashes their own names
    return str(place)


def unknown_name(field: FittedField) -> str:
    """What it means that a value of the field has the id of the never seen."""
    if isinstance(field.encoder, Identity):
        return f"{field.name}: unknown (not below {field.encoder.buckets})"
    where = "in the vocabulary" if isinstance(field.encoder, Vocabulary) else "among the ids that the model keeps"
    return f"{field.name}: unknown (not {where})"


def range_name(field: FittedField, low: float | None, high: float | None) -> str:
    """The values from `low` to below `high`, each a bucket's id or an encoded value; None is no bound."""
    below = None if high is None else _number(field, high)
    if low is None:
        return f"{field.name}: any number" if below is None else f"{field.name} < {below}"
    start = _number(field, low)
    return f"{field.name} ≥ {start}" if below is None else f"{start} ≤ {field.name} < {below}"


def _number(field: FittedField, encoded: float) -> str:
    """Where a bucket begins, or the number behind an encoded value."""
    encoder = field.encoder
    if isinstance(encoder, Quantile):
        return f"{encoder.boundaries[int(encoded) - FIRST - 1]:.10g}"
    if isinstance(encoder, LogBucket):
        return f"{encoder.start(int(encoded)):.4g}"
    assert isinstance(encoder, Scale)  # the other encoders have no order
    scaled = encoded * encoder.scale + encoder.shift
    return f"{np.sign(scaled) * np.expm1(abs(scaled)) if encoder.rule == 'log1p' else scaled:.4g}"
