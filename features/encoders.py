"""Fitted encoders: canonical values in, ids out.

Every encoder keeps id 0 for missing and id 1 for never seen; the ids of values start at 2. An encoder looks only at the
distinct values of a column, so the Python in it runs once per distinct value and not once per row.
"""

from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from features.errors import InputError
from features.schema import FieldSpec, NumericField

MISSING, UNKNOWN, FIRST = 0, 1, 2
MIN_COUNT = 2  # so that the never-seen id is trained, by the values seen once
HASH_SEED = 0  # part of the format: another seed gives other ids

Ids = npt.NDArray[np.int64]


class Encoder(Protocol):
    """What the pipeline asks of an encoder."""

    kind: ClassVar[str]

    @property
    def num_ids(self) -> int:
        """Ids run from 0 to num_ids - 1, so this is the number of rows of the embedding table."""

    def encode(self, values: pa.Array) -> Ids:
        """Ids [N] of canonical values [N]."""

    def state(self) -> dict[str, Any]:
        """What `from_state` needs to rebuild the encoder, as JSON; long lists go to `table`."""

    def table(self) -> pa.Table | None:
        """The long part of the state, one row per value, or None."""


def _by_distinct_value(values: pa.Array, id_of_distinct: Ids, indices: pa.Array) -> Ids:
    ids_with_missing = np.append(id_of_distinct, MISSING)
    return ids_with_missing[pc.fill_null(indices, len(id_of_distinct)).to_numpy(zero_copy_only=False)]


class Vocabulary:
    """Ids by descending count, then by value, so that they depend on the data alone and not on its order."""

    kind: ClassVar[str] = "vocabulary"

    def __init__(self, values: pa.Array) -> None:
        self.values = values

    @classmethod
    def fit(cls, values: pa.Array, min_count: int) -> "Vocabulary":
        """Keep the values seen at least `min_count` times; the rarer ones train the never-seen id."""
        counts = pl.Series("value", values, dtype=pl.String).drop_nulls().value_counts()
        kept = counts.filter(pl.col("count") >= min_count).sort(["count", "value"], descending=[True, False])
        return cls(kept["value"].to_arrow().cast(pa.string()))

    @cached_property
    def _id_of(self) -> dict[str, int]:
        return {value: FIRST + index for index, value in enumerate(self.values.to_pylist())}

    @property
    def num_ids(self) -> int:
        return FIRST + len(self.values)

    def encode(self, values: pa.Array) -> Ids:
        coded = values.dictionary_encode()
        distinct = coded.dictionary.to_pylist()
        found = np.fromiter((self._id_of.get(value, UNKNOWN) for value in distinct), np.int64, len(distinct))
        return _by_distinct_value(values, found, coded.indices)

    def state(self) -> dict[str, Any]:
        return {}

    def table(self) -> pa.Table:
        return pa.table({"value": self.values})

    @classmethod
    def from_state(cls, state: dict[str, Any], table: pa.Table | None) -> "Vocabulary":
        if table is None or table.column_names != ["value"] or table["value"].type != pa.string():
            raise InputError("a vocabulary must be a table with one text column 'value'")
        return cls(pa.concat_arrays(table["value"].chunks) if table.num_rows else pa.array([], pa.string()))


class Hash:
    """xxh3-64 of the UTF-8 text with seed 0, modulo `buckets`: the same on every machine and in every version."""

    kind: ClassVar[str] = "hash"

    def __init__(self, buckets: int) -> None:
        self.buckets = buckets

    @property
    def num_ids(self) -> int:
        return FIRST + self.buckets

    def encode(self, values: pa.Array) -> Ids:
        coded = values.dictionary_encode()
        distinct = coded.dictionary.to_pylist()
        hashes = (xxhash.xxh3_64_intdigest(value.encode(), HASH_SEED) for value in distinct)
        ids = FIRST + (np.fromiter(hashes, np.uint64, len(distinct)) % np.uint64(self.buckets)).astype(np.int64)
        return _by_distinct_value(values, ids, coded.indices)

    def state(self) -> dict[str, Any]:
        return {"buckets": self.buckets}

    def table(self) -> None:
        return None

    @classmethod
    def from_state(cls, state: dict[str, Any], table: pa.Table | None) -> "Hash":
        return cls(int(state["buckets"]))


class Quantile:
    """Buckets between fitted quantiles; a value on a boundary belongs to the bucket above it."""

    kind: ClassVar[str] = "quantile"

    def __init__(self, boundaries: npt.NDArray[np.float64]) -> None:
        self.boundaries = boundaries

    @classmethod
    def fit(cls, values: pa.Array, buckets: int) -> "Quantile":
        """Inner boundaries at the 1/buckets … quantiles; equal ones are merged, so there may be fewer buckets."""
        present = values.drop_null().to_numpy()
        if len(present) == 0:
            return cls(np.empty(0))
        inner = np.quantile(present, np.arange(1, buckets) / buckets, method="lower")
        return cls(np.unique(inner))

    @property
    def num_ids(self) -> int:
        return FIRST + len(self.boundaries) + 1

    def encode(self, values: pa.Array) -> Ids:
        numbers = pc.fill_null(values, 0.0).to_numpy(zero_copy_only=False)
        ids = FIRST + np.searchsorted(self.boundaries, numbers, side="right")
        return np.where(values.is_null().to_numpy(zero_copy_only=False), MISSING, ids)

    def state(self) -> dict[str, Any]:
        return {"boundaries": self.boundaries.tolist()}

    def table(self) -> None:
        return None

    @classmethod
    def from_state(cls, state: dict[str, Any], table: pa.Table | None) -> "Quantile":
        return cls(np.asarray(state["boundaries"], np.float64))


ENCODERS: dict[str, type[Vocabulary] | type[Hash] | type[Quantile]] = {
    cls.kind: cls for cls in (Vocabulary, Hash, Quantile)
}


def fit_encoder(field: FieldSpec, values: pa.Array) -> Encoder:
    """Fit the encoder that the schema names on the training split's canonical values (flat, for a list field)."""
    if isinstance(field, NumericField):
        return Quantile.fit(values, field.buckets)
    if field.encoder == "hash":
        assert field.buckets is not None  # the schema's validator requires it
        return Hash(field.buckets)
    return Vocabulary.fit(values, field.min_count or MIN_COUNT)
