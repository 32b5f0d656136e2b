"""A request's raw values into ids and values: columns of one row, which all rows share, beside columns of N.

They are those of `FeaturePipeline.encode`, bit by bit, in a fraction of its time for a few hundred rows: arrays of
NumPy, no table, and all text in a few calls. What is not usual (values that are no text or number, or not good) is left
to the pipeline, which says what is wrong.

Legend: N rows, M items of a field, K ids of a field with those that stand for empty lists.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.arrays import filled
from features.columns import as_table, canonical
from features.crosses import Part, cross_ids
from features.encoders import MISSING, Cross, DatePart, Hash, Identity, Managed
from features.fields import CategoricalField, CrossField, DateField, ListField, NumericField
from features.online_columns import Column, UnusualError
from features.online_numbers import Numbers
from features.online_text import Texts
from features.pipeline import FeaturePipeline, FittedField

FloatN = npt.NDArray[np.float32]
LengthsN = npt.NDArray[np.int64]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WHOLE_MINUTES = 1e8  # seconds since 1970, after which every zone is whole minutes from UTC


class Ids(NamedTuple):
    """A field's ids, and how many of them each row has; None where each has one."""

    ids_K: npt.NDArray[np.integer]
    lengths_N: LengthsN | None = None


@dataclass(frozen=True)
class Encoded:
    """Ids and values (NaN where missing) of fields, of N rows or of one that stands for all."""

    ids: dict[str, Ids]
    values: dict[str, FloatN]

    def some(self, start: int, stop: int) -> "Encoded":
        """Some of the rows; those that stand for all stay."""
        ids = {name: _some(*field, start, stop) for name, field in self.ids.items()}
        return Encoded(ids, {n: v if len(v) == 1 else v[start:stop] for n, v in self.values.items()})

    @classmethod
    def of(cls, table: pa.Table, shared: Collection[str] = ()) -> "Encoded":
        """From a table that a pipeline has encoded; of the fields in `shared` the first row stands for all."""
        ids, values = {}, {}
        for name in table.column_names:
            column = table[name].slice(0, 1 if name in shared else None).combine_chunks()
            if pa.types.is_floating(column.type):
                values[name] = column.to_numpy(zero_copy_only=False)
            elif pa.types.is_list(column.type):
                lengths_N = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
                ids[name] = Ids(pc.list_flatten(column).to_numpy(zero_copy_only=False), lengths_N)
            else:
                ids[name] = Ids(column.to_numpy(zero_copy_only=False))
        return cls(ids, values)


def _some(ids_K: npt.NDArray[np.integer], lengths_N: LengthsN | None, start: int, stop: int) -> Ids:
    if lengths_N is None:
        return Ids(ids_K if len(ids_K) == 1 else ids_K[start:stop])
    if len(lengths_N) == 1:
        return Ids(ids_K, lengths_N)
    first, last = lengths_N[:start].sum(), lengths_N[:stop].sum()
    return Ids(ids_K[first:last], lengths_N[start:stop])


class OnlineEncoder:
    """Encodes requests with a fitted pipeline; training-only fields count as their defaults, whatever it says."""

    def __init__(self, pipeline: FeaturePipeline) -> None:
        pipeline.warm_up()
        self.pipeline = pipeline
        served = [field for field in pipeline.fields if not getattr(field.spec, "training_only", None)]
        self._texts = [field for field in served if isinstance(field.spec, (CategoricalField, ListField))]
        numeric = [field for field in served if isinstance(field.spec, NumericField)]
        self._numbers = Numbers(numeric)
        self._specs = [field.spec for field in self._texts if isinstance(field.spec, (CategoricalField, ListField))]
        self._kinds = [field.encoder.kind for field in self._texts]
        self._whole = [place for place, field in enumerate(self._texts) if isinstance(field.encoder, Identity)]
        self._salt_F = pipeline.salts([field.name for field in self._texts])
        self._dates = [(field, field.spec) for field in served if isinstance(field.spec, DateField)]
        self._crosses = [(field, field.spec) for field in served if isinstance(field.spec, CrossField)]
        crossed = {name for _, spec in self._crosses for name in spec.of}
        self._parted = [place for place, f in enumerate(self._texts) if f.is_list or f.name in crossed]
        self._fixed = Encoded.of(pa.table(pipeline.served_defaults))
        self._sent = frozenset(field.name for field in (*self._texts, *numeric))
        self._columns = self._sent.union(spec.from_ for _, spec in self._dates)
        fixed = frozenset(self._fixed.ids.keys() | self._fixed.values.keys())
        # Of no method, which would hold this encoder, and all vocabularies, until the collector comes by.
        self._shared = lru_cache(maxsize=64)(partial(_shared, self._sent, self._dates, self._crosses, fixed))

    def shared(self, columns: Iterable[str]) -> frozenset[str]:
        """The fields that all rows share where they share these columns: derived ones if all that they read is."""
        return self._shared(frozenset(columns))

    def encode(self, columns: Mapping[str, Column]) -> Encoded | None:
        """Ids and values of columns of N rows or one; None where it takes the pipeline to do it, or to refuse it.

        Raises:
            InputError: a column is of a type that can never hold its field.
        """
        if not columns.keys() >= self._columns:
            return None
        try:
            ids, parts = self._of_text(columns)
            values, buckets = self._numbers.encode(columns)
            ids |= {name: Ids(ids_N) for name, ids_N in buckets.items()}
            for field, date in self._dates:
                ids[field.name] = Ids(_of_time(field, date, columns[date.from_]))
        except UnusualError:
            return None
        for field, spec in self._crosses:
            assert isinstance(field.encoder, (Cross, Managed))
            crossed = [parts[name] if name in parts else Part.of_ids(ids[name].ids_K) for name in spec.of]
            ids[field.name] = _ids(*cross_ids(field.encoder, crossed))
        for name, part in parts.items():
            ids[name] = _ids(ids[name].ids_K, part.lengths_N)
        return Encoded(ids | self._fixed.ids, values | self._fixed.values)

    def _of_text(self, columns: Mapping[str, Column]) -> tuple[dict[str, Ids], dict[str, Part]]:
        """Ids of the fields with text, without any for empty lists, and hashes of lists and of what crosses read."""
        fields = self._texts
        if not fields:
            return {}, {}
        texts = Texts([columns[field.name] for field in fields], self._specs, self._kinds)
        # Of all values at once, those of fields without a vocabulary too, which finds nothing: fewer calls.
        id_M = self.pipeline.lookup.of_salted(texts.hash_M ^ np.repeat(self._salt_F[texts.order], texts.counts))
        if texts.any_missing:
            id_M[texts.missing_M] = MISSING  # lists keep none
        ids = {}
        for place, field in enumerate(fields):
            encoder = field.encoder
            if isinstance(encoder, (Hash, Managed)):
                found_M = encoder.encode(texts.of(place, texts.hash_M))
                ids[field.name] = Ids(np.where(texts.of(place, texts.missing_M), MISSING, found_M))
            elif not isinstance(encoder, Identity):
                ids[field.name] = Ids(texts.of(place, id_M))
        if self._whole:
            for place, number_M in zip(self._whole, texts.whole_numbers(self._whole), strict=True):
                encoder = fields[place].encoder
                assert isinstance(encoder, Identity)
                ids[fields[place].name] = Ids(encoder.of(number_M))
        return ids, {fields[place].name: texts.part(place) for place in self._parted}


def _shared(
    sent: frozenset[str],
    dates: Sequence[tuple[FittedField, DateField]],
    crosses: Sequence[tuple[FittedField, CrossField]],
    fixed: frozenset[str],
    columns: frozenset[str],
) -> frozenset[str]:
    """See `OnlineEncoder.shared`; `fixed` are the fields that no request decides."""
    fields = set(sent.intersection(columns))
    fields |= {field.name for field, spec in dates if spec.from_ in columns}
    crossed = {field.name for field, spec in crosses if fields.issuperset(spec.of)}
    return frozenset(fields | crossed | fixed)


def _ids(ids_M: npt.NDArray[np.integer], lengths_N: LengthsN | None) -> Ids:
    return Ids(ids_M) if lengths_N is None else Ids(*filled(ids_M, lengths_N))


def _of_time(field: FittedField, spec: DateField, column: Column) -> npt.NDArray[np.integer]:
    encoder = field.encoder
    assert isinstance(encoder, DatePart)
    if isinstance(column, list) and len(column) == 1 and isinstance(column[0], datetime):
        moment = column[0] if column[0].tzinfo else column[0].replace(tzinfo=UTC)
        minute = (moment - _EPOCH) // timedelta(minutes=1)
        if minute * 60 >= _WHOLE_MINUTES:
            return np.array([_part_in_minute(encoder.part, encoder.timezone, minute)])
    found = canonical(as_table({spec.from_: column}), spec)
    if found.bad_N is not None:
        raise UnusualError
    return encoder.encode(found.values)


@lru_cache(maxsize=4096)
def _part_in_minute(part: str, timezone: str, minute: int) -> int:
    """The id of every time within a minute since 1970."""
    return int(DatePart(0, part, timezone).encode(pa.array([60.0 * minute]))[0])
