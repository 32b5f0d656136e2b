"""Encoders, fitted on counts of the training rows' values (`features.counting`) that are gathered chunk by chunk."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.columns import Rows, as_table, canonical
from features.counting import NumberCounts, TextCounts, count_text
from features.encoders import AnyEncoder, Cross, DatePart, Hash, Identity, LogBucket, Managed, Quantile, Scale
from features.fields import DATE_PARTS, CategoricalField, CrossField, DateField, FieldSpec, ListField, NumericField
from features.pipeline import FeaturePipeline
from features.schema import Schema

MIN_COUNT = 2  # so that the never-seen id is trained, by the values seen once
EVICTION = "lfu"

FloatN = npt.NDArray[np.float64]


class Counts:
    """What is counted of training rows, by the field that owns the encoder: text values and numbers."""

    def __init__(self) -> None:
        self._text: dict[str, TextCounts] = {}
        self._numbers: dict[str, NumberCounts] = {}

    def add(self, part: "ChunkCounts") -> None:
        """Add the counts of a chunk of rows."""
        for name, frame in part.text.items():
            self._text.setdefault(name, TextCounts()).add(frame)
        for name, counts in part.numbers.items():
            self._numbers.setdefault(name, NumberCounts()).add(counts)

    def encoders(self, fields: tuple[FieldSpec, ...]) -> dict[str, AnyEncoder]:
        """The fitted encoder of each field that owns one."""
        owners = [field for field in fields if not getattr(field, "share_with", None)]
        return {f.name: _fit(f, self._text.pop(f.name, None), self._numbers.get(f.name)) for f in owners}

    def quantiles(self, name: str, levels: FloatN) -> FloatN:
        """Quantiles of a numeric field; empty where it was not counted."""
        return self._numbers.get(name, NumberCounts()).quantiles(levels)


@dataclass(frozen=True)
class ChunkCounts:
    """Counts of one chunk's rows, small enough to be sent to whoever adds them up."""

    text: dict[str, pl.DataFrame]
    numbers: dict[str, NumberCounts]


def count_columns(fields: tuple[FieldSpec, ...], canonical: Mapping[str, pa.Array]) -> ChunkCounts:
    """Count the canonical columns of training rows that encoders are fitted on, and the numbers that profiles need."""
    by_name = {field.name: field for field in fields}
    text: dict[str, list[pl.DataFrame]] = {}
    numbers: dict[str, NumberCounts] = {}
    for field in fields:
        owner = by_name[getattr(field, "share_with", None) or field.name]
        if isinstance(owner, (CategoricalField, ListField)) and owner.encoder == "vocabulary":
            column = canonical[field.name]
            text.setdefault(owner.name, []).append(
                count_text(pc.list_flatten(column) if isinstance(field, ListField) else column)
            )
        elif isinstance(field, NumericField) and field.encoder != "log_bucket":
            numbers[field.name] = NumberCounts.of(canonical[field.name])
    return ChunkCounts({name: pl.concat(parts) for name, parts in text.items()}, numbers)


def fit_pipeline(schema: Schema, rows: Rows) -> FeaturePipeline:
    """Fit a pipeline on rows in memory; `masknet prepare` does the same for files of any size.

    Raises:
        InputError: a field's column is missing, or can never hold what the schema says. Values that cannot be read
            are left out.
    """
    table = as_table(rows)
    inputs = [field for field in schema.fields if not isinstance(field, CrossField)]
    counts = Counts()
    counts.add(count_columns(schema.fields, {f.name: canonical(table, f, schema.encoder_of(f)).values for f in inputs}))
    return FeaturePipeline.build(schema.fields, counts.encoders(schema.fields))


def _fit(field: FieldSpec, text: TextCounts | None, numbers: NumberCounts | None) -> AnyEncoder:
    """The encoder that the schema asks for, from the training split's counts where it takes any."""
    if isinstance(field, DateField):
        return DatePart(DATE_PARTS[field.part], field.part, field.timezone)
    if isinstance(field, NumericField):
        return _fit_number(field, numbers or NumberCounts())
    if field.encoder == "managed":
        assert field.buckets is not None  # as below
        return Managed(field.buckets, field.eviction or EVICTION)
    if isinstance(field, CrossField):
        return Cross(field.buckets)
    if field.encoder == "vocabulary":
        return (text or TextCounts()).vocabulary(field.min_count or MIN_COUNT, field.max_size)
    assert field.buckets is not None  # the schema's validator requires it
    return (Hash if field.encoder == "hash" else Identity)(field.buckets)


def _fit_number(field: NumericField, counts: NumberCounts) -> Quantile | LogBucket | Scale:
    if field.encoder == "quantile":
        return Quantile(np.unique(counts.quantiles(np.arange(1, field.num_buckets) / field.num_buckets)))
    if field.encoder == "log_bucket":
        return LogBucket(field.num_buckets)
    values, rows = counts.table()
    if field.encoder == "log1p" or len(values) == 0:
        return Scale(field.encoder)
    largest = float(np.finfo(np.float64).max)
    if field.encoder == "minmax":
        with np.errstate(over="ignore"):
            return Scale("minmax", float(values[0]), min(float(values[-1] - values[0]), largest) or 1.0)
    unit = float(np.abs(values).max()) or 1.0  # squares of the numbers themselves may be beyond a double
    mean = float(np.average(values / unit, weights=rows))
    deviation = float(np.sqrt(np.average((values / unit - mean) ** 2, weights=rows)))
    return Scale("standard", mean * unit, min(deviation * unit, largest) or 1.0)
