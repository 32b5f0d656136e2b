"""Statistics of encoded rows, gathered chunk by chunk and merged in any order: what the profile is made of.

Legend: S splits, K bins, N rows or, for list fields, items.
"""

from collections import Counter

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.counting import NumberCounts, count_text
from features.dataset import LABEL, SPLITS, TIME
from features.encoders import FIRST, MISSING, UNKNOWN, Hash, Identity, Managed, Scale, Vocabulary
from features.fields import CrossField, ListField, NumericField
from features.hashing import HashN, hash_text, mix
from features.pipeline import FeaturePipeline, FittedField
from features.sketches import DistinctSketch, RepeatSketch

BINS = 4096  # ids told apart; the rarer ids of a larger vocabulary share the last, hashes and their buckets by modulo
_NAMED = 10_000  # hashed values whose counts are kept, and how many of a chunk's most frequent ones are looked at
_OF_CHUNK = 1_000

SplitN = npt.NDArray[np.int8]
Edges = dict[str, npt.NDArray[np.float64]]


class FieldStats:
    """Of one field: rows by label, split and bin; and by split numbers, frequent values, distinct ones."""

    def __init__(self, bins: int) -> None:
        self.count_LSK = np.zeros((2, len(SPLITS), bins), np.int64)
        self.distinct = [DistinctSketch() for _ in SPLITS]
        self.named: list[Counter[str]] = [Counter() for _ in SPLITS]
        self.numbers = [NumberCounts() for _ in SPLITS]

    def merge(self, other: "FieldStats") -> None:
        """Add the statistics of other rows."""
        self.count_LSK += other.count_LSK
        for number in range(len(SPLITS)):
            self.distinct[number].merge(other.distinct[number])
            named = (self.named[number] + other.named[number]).items()
            self.named[number] = Counter(dict(sorted(named, key=lambda pair: (-pair[1], pair[0]))[:_NAMED]))
            self.numbers[number].add(other.numbers[number])


class Stats:
    """Of all rows and fields."""

    def __init__(self, pipeline: FeaturePipeline, edges: Edges) -> None:
        self.fields = {field.name: FieldStats(num_bins(field, edges)) for field in pipeline.fields}
        self.rows_LS = np.zeros((2, len(SPLITS)), np.int64)
        self.time_range = np.tile([np.inf, -np.inf], (len(SPLITS), 1))
        self.rows = RepeatSketch()

    def merge(self, other: "Stats") -> None:
        """Add the statistics of other rows."""
        for name, stats in other.fields.items():
            self.fields[name].merge(stats)
        self.rows_LS += other.rows_LS
        self.time_range[:, 0] = np.minimum(self.time_range[:, 0], other.time_range[:, 0])
        self.time_range[:, 1] = np.maximum(self.time_range[:, 1], other.time_range[:, 1])
        self.rows.merge(other.rows)

    def add(
        self, pipeline: FeaturePipeline, canonical: pa.Table, encoded: pa.Table, split_N: SplitN, edges: Edges
    ) -> None:
        """Add a chunk.

        Args:
            pipeline: what has encoded the chunk.
            canonical: its canonical columns, labels and times.
            encoded: its ids and values.
            split_N: the number of each row's split.
            edges: for value fields, where their bins begin.
        """
        label_N = canonical[LABEL].to_numpy().astype(np.int64)
        self.rows_LS += np.bincount(split_N + len(SPLITS) * label_N, minlength=2 * len(SPLITS)).reshape(2, -1)
        self._add_times(canonical, split_N)
        row_hash_N = mix(label_N.astype(np.uint64) + np.uint64(1))
        for field in pipeline.fields:
            column = encoded[field.name].combine_chunks()
            raw = None if isinstance(field.spec, CrossField) else canonical[field.name].combine_chunks()
            row_hash_N = mix(row_hash_N + self._add_field(field, raw, column, split_N, label_N, edges))
        time = canonical[TIME]
        if time.null_count < len(time):
            row_hash_N = mix(row_hash_N + time.to_numpy().view(np.uint64))
        self.rows.add(row_hash_N)

    def _add_times(self, canonical: pa.Table, split_N: SplitN) -> None:
        if canonical[TIME].null_count == len(split_N):
            return
        time_N = canonical[TIME].to_numpy()
        for number in range(len(SPLITS)):
            inside = time_N[split_N == number]
            if inside.size:
                low, high = self.time_range[number]
                self.time_range[number] = min(low, inside.min()), max(high, inside.max())

    def _add_field(
        self,
        field: FittedField,
        raw: pa.Array | None,
        column: pa.Array,
        split_N: SplitN,
        label_N: npt.NDArray[np.int64],
        edges: Edges,
    ) -> HashN:
        """Add a field's column; returns a hash of each row's value."""
        lengths = None
        if pa.types.is_list(column.type):
            lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
            column, split_N, label_N = pc.list_flatten(column), np.repeat(split_N, lengths), np.repeat(label_N, lengths)
        bin_N, code_N = bins_of(field, column, edges)
        stats = self.fields[field.name]
        flat_N = bin_N + stats.count_LSK.shape[-1] * (split_N.astype(np.int64) + len(SPLITS) * label_N)
        stats.count_LSK += np.bincount(flat_N, minlength=stats.count_LSK.size).reshape(stats.count_LSK.shape)
        if raw is not None:
            _add_values(stats, field, raw, bin_N, code_N, split_N)
        elif field.is_managed or (not isinstance(field.encoder, Scale) and field.encoder.num_ids > BINS):
            _add_distinct(stats, mix(code_N[bin_N >= FIRST]), split_N[bin_N >= FIRST])
        if lengths is None:
            return code_N
        item_hash_N = np.append(mix(code_N), np.uint64(0))
        return np.add.reduceat(item_hash_N, np.cumsum(lengths) - lengths) if len(lengths) else item_hash_N[:0]


def num_bins(field: FittedField, edges: Edges) -> int:
    """K of a field; `edges` are where the bins of value fields begin."""
    if isinstance(field.encoder, Scale):
        return FIRST + len(edges.get(field.name, ())) + 1
    return BINS if field.is_managed else min(field.encoder.num_ids, BINS)


def bins_of(field: FittedField, column: pa.Array, edges: Edges) -> tuple[npt.NDArray[np.int64], HashN]:
    """The bin of each id or value, lists flattened, and a number that tells ids or values apart."""
    if isinstance(field.encoder, Scale):
        values_N = pc.fill_null(column, np.nan).to_numpy(zero_copy_only=False)
        bin_N = FIRST + np.searchsorted(edges.get(field.name, np.empty(0)), values_N.astype(np.float64), side="right")
        return np.where(np.isnan(values_N), MISSING, bin_N), values_N.view(np.uint32).astype(np.uint64)
    ids_N = column.to_numpy(zero_copy_only=False).astype(np.int64)
    if field.encoder.num_ids <= BINS and not field.is_managed:
        bin_N = ids_N
    elif isinstance(field.encoder, Vocabulary):
        bin_N = np.minimum(ids_N, BINS - 1)
    else:
        bin_N = np.where(ids_N < FIRST, ids_N, FIRST + (ids_N - FIRST) % (BINS - FIRST))
    return bin_N, ids_N.astype(np.uint64)


def _add_values(
    stats: FieldStats, field: FittedField, raw: pa.Array, bin_N: npt.NDArray[np.int64], code_N: HashN, split_N: SplitN
) -> None:
    """Distinct and frequent values, and numbers, from the canonical column behind the ids."""
    if isinstance(field.spec, NumericField):
        _add_numbers(stats, raw, split_N)
        return
    if type(field.encoder) in (Hash, Managed):
        chosen_N = bin_N != MISSING
    else:
        if field.encoder.num_ids > BINS:  # type: ignore[union-attr]  # text and dates have ids; else bins tell them apart
            known_N = bin_N >= FIRST
            _add_distinct(stats, mix(code_N[known_N]), split_N[known_N])
        chosen_N = bin_N == UNKNOWN
    if chosen_N.any() and isinstance(field.encoder, (Vocabulary, Identity, Hash, Managed)):
        _add_text(stats, field, raw, chosen_N, split_N)


def _add_numbers(stats: FieldStats, raw: pa.Array, split_N: SplitN) -> None:
    frame = pl.DataFrame({"value": pl.Series(raw, dtype=pl.Float64) + 0.0, "split": split_N})  # −0 is 0
    counts = frame.drop_nulls().group_by("split", "value").agg(count=pl.len().cast(pl.Int64))
    for number, numbers in enumerate(stats.numbers):
        numbers.add_counts(counts.filter(pl.col("split") == number).select("value", "count"))


def _add_distinct(stats: FieldStats, hash_N: HashN, split_N: SplitN) -> None:
    for number, sketch in enumerate(stats.distinct):
        sketch.add(hash_N[sketch.is_wanted(hash_N) & (split_N == number)])


def _add_text(
    stats: FieldStats, field: FittedField, raw: pa.Array, chosen_N: npt.NDArray[np.bool_], split_N: SplitN
) -> None:
    """Text that has no id of its own: all of a hashed field's, the never-seen of another's."""
    if isinstance(field.spec, ListField):  # an empty list is one missing id, and no item
        items = pc.list_flatten(raw)
        full_N = ~_empty_places(raw) if len(items) != len(chosen_N) else np.ones(len(chosen_N), bool)
        values, split_N = items.filter(pa.array(chosen_N[full_N])), split_N[full_N & chosen_N]
    else:
        values, split_N = raw.filter(pa.array(chosen_N)), split_N[chosen_N]
    _add_distinct(stats, hash_text(values), split_N)
    if type(field.encoder) not in (Hash, Managed):
        return
    for number, named in enumerate(stats.named):
        inside = values if (split_N == number).all() else values.filter(pa.array(split_N == number))
        top = count_text(inside).sort(["count", "value"], descending=[True, False]).head(_OF_CHUNK)
        named.update(dict(zip(top["value"].to_list(), top["count"].to_list(), strict=True)))


def _empty_places(lists: pa.Array) -> npt.NDArray[np.bool_]:
    """In the sequence of ids, where an empty list stands as one missing id."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return np.repeat(lengths == 0, np.maximum(lengths, 1))
