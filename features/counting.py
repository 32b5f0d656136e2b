"""Counts of distinct values, whatever their number, gathered in parts that merge in any order.

Text is counted exactly: beyond SPILL_ROWS distinct values the counts go to disk, divided by the values' hashes, and are
added up part by part at the end. Numbers are counted exactly up to DISTINCT distinct ones; a field with more has its
values' last binary digits cut, as many as it takes, and says how far off they may be.
"""

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from features.encoders import Vocabulary
from features.hashing import hash_text

SPILL_ROWS = 4_000_000  # counted values held in memory per vocabulary
DISTINCT = 2**18
_PARTITIONS = 16
_PENDING = 1_000_000
_FRAMES = 64
_MANTISSA = 52

FloatN = npt.NDArray[np.float64]


def count_text(values: pa.Array) -> pl.DataFrame:
    """Distinct non-null values and their counts: columns value, count."""
    series = pl.Series("value", values, dtype=pl.String)
    return series.value_counts().drop_nulls("value").cast({"count": pl.Int64})


class TextCounts:
    """Adds up counts of text values and makes a vocabulary of them."""

    def __init__(self) -> None:
        self._merged = pl.DataFrame(schema={"value": pl.String, "count": pl.Int64})
        self._pending: list[pl.DataFrame] = []
        self._pending_rows = 0
        self._spill: tempfile.TemporaryDirectory[str] | None = None
        self._spills = 0

    def add(self, counts: pl.DataFrame) -> None:
        """Add what `count_text` gave."""
        self._pending.append(counts)
        self._pending_rows += counts.height
        if self._pending_rows > max(_PENDING, self._merged.height):
            self._merge()

    def _merge(self) -> None:
        if self._pending:
            self._merged = _sum_by_value([self._merged, *self._pending])
            self._pending, self._pending_rows = [], 0
        if self._merged.height > SPILL_ROWS:
            self._to_disk()

    def _to_disk(self) -> None:
        self._spill = self._spill or tempfile.TemporaryDirectory(prefix="masknet-counts-")
        part = pl.Series("part", hash_text(self._merged["value"]) % np.uint64(_PARTITIONS))
        for (number,), rows in self._merged.with_columns(part).partition_by("part", as_dict=True).items():
            rows.drop("part").write_ipc(Path(self._spill.name) / f"{number}-{self._spills}.arrow", compression="lz4")
        self._spills += 1
        self._merged = self._merged.clear()

    def vocabulary(self, min_count: int, max_size: int | None) -> Vocabulary:
        """The values seen at least `min_count` times, by count, then value; the first `max_size` of them."""
        self._merge()
        if self._spill is None:
            kept = [self._merged.filter(pl.col("count") >= min_count)]
        else:
            self._to_disk()
            with self._spill as folder:
                kept = [_kept_of(Path(folder), part, min_count) for part in range(_PARTITIONS)]
        ordered = pl.concat(kept).sort(["count", "value"], descending=[True, False])
        chosen = ordered["value"] if max_size is None else ordered["value"].head(max_size)
        return Vocabulary(chosen.to_arrow().cast(pa.string()))


def _kept_of(folder: Path, part: int, min_count: int) -> pl.DataFrame:
    files = sorted(folder.glob(f"{part}-*.arrow"))
    if not files:
        return pl.DataFrame(schema={"value": pl.String, "count": pl.Int64})
    frames = [pl.read_ipc(file) for file in files]
    return _sum_by_value(frames).filter(pl.col("count") >= min_count)


def _sum_by_value(frames: list[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(frames).group_by("value").agg(pl.col("count").sum())


class NumberCounts:
    """Distinct numbers and how often each occurs, merged in any order with the same result."""

    def __init__(self) -> None:
        self._counts = pl.DataFrame(schema={"value": pl.Float64, "count": pl.Int64})
        self._pending: list[pl.DataFrame] = []
        self._pending_rows = 0
        self._cut = 0  # binary digits that values have lost

    @classmethod
    def of(cls, values: pa.Array) -> "NumberCounts":
        """Count the non-null numbers of a column."""
        counts = cls()
        series = pl.Series("value", values, dtype=pl.Float64).drop_nulls() + 0.0  # −0 is 0
        counts.add_counts(series.value_counts().cast({"count": pl.Int64}))
        return counts

    def add(self, other: "NumberCounts") -> None:
        """Add the counts of other rows."""
        self._cut = max(self._cut, other._cut)
        for frame in (other._counts, *other._pending):
            self.add_counts(frame)

    def add_counts(self, counts: pl.DataFrame) -> None:
        """Add distinct values and their counts: columns value, count."""
        if counts.height:
            self._pending.append(counts)
            self._pending_rows += counts.height
        if self._pending_rows > max(DISTINCT, self._counts.height) or len(self._pending) > _FRAMES:
            self._settle()

    def _settle(self) -> pl.DataFrame:
        """Add up what is pending, with no more digits than leave DISTINCT values."""
        if self._pending:
            self._counts = self._summed([self._counts, *self._pending])
            self._pending, self._pending_rows = [], 0
            while self._counts.height > DISTINCT:
                self._cut += 1
                self._counts = self._summed([self._counts])
        return self._counts

    def _summed(self, frames: list[pl.DataFrame]) -> pl.DataFrame:
        together = pl.concat(frames)
        if self._cut:
            bits = together["value"].to_numpy().view(np.int64) & np.int64(-(1 << self._cut))
            together = together.with_columns(value=pl.Series(bits.view(np.float64)))
        return _sum_by_value([together])

    @property
    def relative_error(self) -> float:
        """How far a value may be off, as a part of it."""
        self._settle()
        return 2.0 ** (self._cut - _MANTISSA) if self._cut else 0.0

    def table(self) -> tuple[FloatN, npt.NDArray[np.int64]]:
        """Distinct values in order, and their counts."""
        ordered = self._settle().sort("value")
        return ordered["value"].to_numpy(), ordered["count"].to_numpy()

    def quantiles(self, levels: FloatN) -> FloatN:
        """The values at the given levels, the lower of two neighbours; empty without values."""
        values, counts = self.table()
        if len(values) == 0:
            return np.empty(0)
        ranks = np.floor(levels * (counts.sum() - 1) + 1e-9)
        return values[np.searchsorted(np.cumsum(counts), ranks, side="right")]
