"""Fitted encoders: canonical values in, ids or values out, a whole column at a time.

Every encoder of ids keeps id 0 for missing and id 1 for never seen; the ids of values start at 2. Encoders of text see
the values' hashes (`features.hashing`), encoders of numbers the numbers. Ids are rows of a table, but for those of
managed fields, which find their rows in a map that training keeps (`features.id_maps`).
"""

from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import InputError
from features.hashing import HashN
from features.times import part_of

MISSING, UNKNOWN, FIRST = 0, 1, 2

Ids = npt.NDArray[np.int64]
FloatN = npt.NDArray[np.float64]
BoolN = npt.NDArray[np.bool_]
_LARGEST = float(np.finfo(np.float32).max)


class Encoder(Protocol):
    """What a pipeline stores of an encoder."""

    kind: ClassVar[str]

    def state(self) -> dict[str, Any]:
        """What `load_encoder` needs to rebuild the encoder, as JSON; a vocabulary is stored as a table instead."""


class Vocabulary:
    """Ids by descending count, then by value, so that they depend on the data alone and not on its order.

    Values are found by `features.lookup.Lookup`, which holds the vocabularies of a pipeline together.
    """

    kind: ClassVar[str] = "vocabulary"

    def __init__(self, values: pa.Array) -> None:
        self.values = values

    @property
    def num_ids(self) -> int:
        """Ids run from 0 to num_ids - 1, so this is the number of rows of the embedding table."""
        return FIRST + len(self.values)

    def state(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_table(cls, table: pa.Table | None) -> "Vocabulary":
        """From a table with one text column `value`."""
        if table is None or table.column_names != ["value"] or table["value"].type != pa.string():
            raise InputError("a vocabulary must be a table with one text column 'value'")
        return cls(pa.concat_arrays(table["value"].chunks) if table.num_rows else pa.array([], pa.string()))


class _Buckets:
    """A fixed number of ids beside missing and never seen."""

    def __init__(self, buckets: int) -> None:
        self.buckets = buckets

    @property
    def num_ids(self) -> int:
        return FIRST + self.buckets

    def state(self) -> dict[str, Any]:
        return {"buckets": self.buckets}


class Hash(_Buckets):
    """xxh3-64 modulo `buckets`: the same on every machine and in every version."""

    kind: ClassVar[str] = "hash"

    def encode(self, hash_N: HashN) -> Ids:
        """Ids of the values with these hashes, none of which is missing."""
        return (hash_N % np.uint64(self.buckets)).astype(np.int64) + FIRST


class Cross(Hash):
    """The hash of several values' combination, modulo `buckets`."""

    kind: ClassVar[str] = "cross"


class Managed:
    """Hashes as ids, which get rows of a table with `buckets` rows while training goes on. Nothing is fitted.

    Ids are the upper 63 bits of xxh3-64 (or of a cross's hash): never negative in 64 bits with a sign. The lowest two
    stand for missing and never seen, the highest for a free row. There is one chance in 184,000 that any two of ten
    million values collide.
    """

    kind: ClassVar[str] = "managed"
    _LARGEST = 2**63 - 2

    def __init__(self, buckets: int, eviction: str) -> None:
        self.buckets, self.eviction = buckets, eviction

    @property
    def num_ids(self) -> int:
        """Rows of the table, those of missing and never seen among them; ids themselves are larger."""
        return self.buckets

    def encode(self, hash_N: HashN) -> Ids:
        """Ids of the values with these hashes, none of which is missing."""
        return np.clip((hash_N >> np.uint64(1)).view(np.int64), FIRST, self._LARGEST)

    def state(self) -> dict[str, Any]:
        return {"buckets": self.buckets, "eviction": self.eviction}


class Identity(_Buckets):
    """Whole numbers that are ids already: 0 … buckets − 1; a larger one was never seen."""

    kind: ClassVar[str] = "identity"

    def encode(self, text: pa.Array) -> Ids:
        """Ids of whole numbers as text."""
        return self.of(whole_numbers(text))

    def of(self, numbers: Ids) -> Ids:
        """Ids of whole numbers, −1 where missing."""
        ids = np.where(numbers < self.buckets, numbers + FIRST, UNKNOWN)
        return np.where(numbers < 0, MISSING, ids)


class Quantile:
    """Buckets between fitted quantiles; a value on a boundary belongs to the bucket above it."""

    kind: ClassVar[str] = "quantile"

    def __init__(self, boundaries: FloatN) -> None:
        self.boundaries = boundaries

    @property
    def num_ids(self) -> int:
        return FIRST + len(self.boundaries) + 1

    def encode(self, values: pa.Array) -> Ids:
        """Ids of doubles."""
        return self.of(*_doubles(values))

    def of(self, numbers: FloatN, missing_N: BoolN) -> Ids:
        """The same of finite numbers, any where missing."""
        return np.where(missing_N, MISSING, FIRST + np.searchsorted(self.boundaries, numbers, side="right"))

    def state(self) -> dict[str, Any]:
        return {"boundaries": self.boundaries.tolist()}


class LogBucket(_Buckets):
    """⌊ln(x)²⌋ above 2, as the winners of Criteo's contest had it, and a bucket for each whole number up to 2.

    Values below −3 go with −3, and ids beyond the last bucket with the last. Nothing is fitted.
    """

    kind: ClassVar[str] = "log_bucket"
    _LOWEST, _SMALL = -3, 6  # −3, −2, −1, 0, 1, 2
    ABOVE_TWO: ClassVar[int] = FIRST + 6  # what is between 2 and e, both excluded: no whole number

    def encode(self, values: pa.Array) -> Ids:
        """Ids of doubles."""
        return self.of(*_doubles(values))

    def of(self, numbers: FloatN, missing_N: BoolN) -> Ids:
        """The same of finite numbers, any where missing."""
        small = np.maximum(np.floor(np.minimum(numbers, 2.0)), self._LOWEST) - self._LOWEST
        large = self._SMALL + np.floor(np.log(np.maximum(numbers, 2.0)) ** 2)
        bucket = np.minimum(np.where(numbers > 2, large, small), self.buckets - 1).astype(np.int64)
        return np.where(missing_N, MISSING, FIRST + bucket)

    def start(self, id_: int) -> float:
        """The least number with an id other than the first; of `ABOVE_TWO`, 2, which it excludes."""
        place = id_ - FIRST
        return float(place + self._LOWEST if place < self._SMALL else max(2.0, np.exp(np.sqrt(place - self._SMALL))))


class DatePart(_Buckets):
    """A part of a time in a time zone."""

    kind: ClassVar[str] = "date"

    def __init__(self, buckets: int, part: str, timezone: str) -> None:
        super().__init__(buckets)
        self.part, self.timezone = part, timezone

    def encode(self, seconds: pa.Array) -> Ids:
        """Ids of times in seconds."""
        part_N = part_of(seconds, self.part, self.timezone)
        return np.where(part_N < 0, MISSING, FIRST + part_N)

    def state(self) -> dict[str, Any]:
        return {"buckets": self.buckets, "part": self.part, "timezone": self.timezone}


class Scale:
    """(f(x) − shift) / scale as a value: `standard` has mean 0 and variance 1, `minmax` stays within 0 … 1,
    `log1p` is sign(x) · ln(1 + |x|)."""

    kind: ClassVar[str] = "value"

    def __init__(self, rule: str, shift: float = 0.0, scale: float = 1.0) -> None:
        self.rule, self.shift, self.scale = rule, shift, scale

    def encode(self, values: pa.Array) -> pa.Array:
        """Values as float32, null where missing."""
        numbers, missing_N = _doubles(values)
        return pa.array(self.of(numbers), mask=missing_N)

    def of(self, numbers: FloatN) -> npt.NDArray[np.float32]:
        """Values of finite numbers."""
        return scaled(self.rule, numbers, self.shift, self.scale)

    def state(self) -> dict[str, Any]:
        return {"rule": self.rule, "shift": self.shift, "scale": self.scale}


def scaled(rule: str, numbers: FloatN, shift: FloatN | float, scale: FloatN | float) -> npt.NDArray[np.float32]:
    """(f(x) − shift) / scale of finite numbers, as `Scale` has it; shift and scale may be one for each number."""
    if rule == "log1p":
        numbers = np.sign(numbers) * np.log1p(np.abs(numbers))
    with np.errstate(over="ignore"):
        found = (numbers - shift) / scale
    low, high = (0.0, 1.0) if rule == "minmax" else (-_LARGEST, _LARGEST)
    return np.minimum(np.maximum(found, low), high).astype(np.float32)


def whole_numbers(text: pa.Array) -> Ids:
    """Whole numbers of decimal digits, −1 for null."""
    numbers: Ids = pc.fill_null(text.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    return numbers


def _doubles(values: pa.Array) -> tuple[FloatN, BoolN]:
    return pc.fill_null(values, 0.0).to_numpy(zero_copy_only=False), values.is_null().to_numpy(zero_copy_only=False)


NumberEncoder: TypeAlias = Quantile | LogBucket | DatePart
IdEncoder: TypeAlias = Vocabulary | Hash | Cross | Managed | Identity | Quantile | LogBucket | DatePart
AnyEncoder: TypeAlias = IdEncoder | Scale


def load_encoder(kind: str, state: dict[str, Any], table: pa.Table | None) -> AnyEncoder:
    """Rebuild an encoder from what a pipeline has stored; KeyError or TypeError where that is not enough."""
    if kind == Vocabulary.kind:
        return Vocabulary.from_table(table)
    if kind == Quantile.kind:
        return Quantile(np.asarray(state["boundaries"], np.float64))
    plain: dict[str, type[Hash | Managed | Identity | LogBucket | DatePart | Scale]] = {
        cls.kind: cls for cls in (Hash, Cross, Managed, Identity, LogBucket, DatePart, Scale)
    }
    return plain[kind](**state)
