"""Rows counted for drift, a chunk at a time: by field, group of values, and random part of the users or requests.

Legend: N rows, I items of lists or rows, R random parts, G groups.
"""

from collections import Counter

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.arrays import flat_values
from features.columns import as_strings, canonical, plain
from features.drift import group_of_bins
from features.errors import InputError
from features.fields import DateField
from features.hashing import hash_text, mix
from features.pipeline import FittedField
from features.stats import bins_of, num_bins
from serving.bundle import Bundle
from serving.monitoring.chance import PARTS
from serving.monitoring.log_rows import own_name
from serving.monitoring.reference import Reference

CountRG = npt.NDArray[np.int64]
IndexN = npt.NDArray[np.int64]
Range = tuple[float, float]


class RowCounts:
    """What has been seen of the rows so far."""

    def __init__(self, bundle: Bundle, version: str, reference: Reference) -> None:
        self._bundle, self._version, self._reference = bundle, version, reference
        self._served_as = {name: own_name(name, bundle.schema) for name in ("request_id", "time", "version", "role")}
        self._score = own_name("score", bundle.schema)
        self.fields = [f for f in bundle.pipeline.fields if f.name not in bundle.schema.training_only]
        self.found = {f.name: np.zeros((PARTS, len(reference.fields[f.name].counts)), np.int64) for f in self.fields}
        self.served_RG = np.zeros((PARTS, len(reference.score.counts)), np.int64)
        self.scored_RG = self.served_RG.copy()
        self.rows, self.versions = 0, Counter[str]()
        self.ranges: dict[str, Range] = {}  # in seconds since 1970, of the columns that date fields read
        self.times: Range | None = None

    def add(self, table: pa.Table) -> None:
        """Count rows; their scores where they are this version's."""
        self._add_served(table)
        table = self._answered(table)
        if not table.num_rows:
            return
        encoded = self._bundle.pipeline.encode(table)
        part_N = self._parts(table)
        for field in self.fields:
            self._add_field(field, encoded, part_N)
        self._add_times(table)
        self.rows += table.num_rows

    def add_scores(self, table: pa.Table) -> None:
        """Count the scores that the model gives the rows."""
        table = self._answered(table)
        if not table.num_rows:
            return
        self._count_scores(self.scored_RG, self._bundle.scorer.score(table), self._parts(table))

    def _answered(self, table: pa.Table) -> pa.Table:
        """The rows without those of shadow scorings, which stand in the log a second time."""
        role = self._served_as["role"]
        if role not in table.column_names:
            return table
        text = as_strings(plain(table[role]), role).values  # raw rows may have such a column, of any kind
        return table.filter(pc.fill_null(pc.not_equal(text, "shadow"), True))

    def _parts(self, table: pa.Table) -> IndexN:
        """The random part of each row: by its group, such as the user, else by its request, else by itself."""
        group, request = self._bundle.schema.group, self._served_as["request_id"]
        name = group if group is not None and group in table.column_names else request
        if name in table.column_names:
            hash_N = hash_text(as_strings(plain(table[name]), name).values)
        else:
            hash_N = np.arange(self.rows, self.rows + table.num_rows).astype(np.uint64)
        return (mix(hash_N) % np.uint64(PARTS)).astype(np.int64)

    def _add_field(self, field: FittedField, encoded: pa.Table, part_N: IndexN) -> None:
        values, length_N = flat_values(encoded[field.name].combine_chunks())
        edges = self._reference.edges
        bin_I, _ = bins_of(field, values, edges)
        group_K = group_of_bins(np.array(self._reference.fields[field.name].bins, np.int64), num_bins(field, edges))
        part_I = part_N if length_N is None else np.repeat(part_N, length_N)
        _count(self.found[field.name], part_I, group_K[bin_I])

    def _add_served(self, table: pa.Table) -> None:
        version = self._served_as["version"]
        if version not in table.column_names:
            return
        text = as_strings(plain(table[version]), version).values
        self.versions.update({one["values"]: one["counts"] for one in text.value_counts().to_pylist()})
        if self._score in table.column_names:
            own = table.filter(pc.fill_null(pc.equal(text, self._version), False))
            if own.num_rows:
                self._count_scores(self.served_RG, _scores(own[self._score], self._score), self._parts(own))

    def _count_scores(self, found_RG: CountRG, score_N: npt.NDArray[np.floating], part_N: IndexN) -> None:
        starts = np.array(self._reference.score.starts)
        _count(found_RG, part_N, np.searchsorted(starts, score_N, side="right"))

    def _add_times(self, table: pa.Table) -> None:
        for field in self._bundle.pipeline.fields:
            if isinstance(field.spec, DateField):
                seconds = canonical(table, field.spec).values
                self.ranges[field.spec.from_] = _wider(self.ranges.get(field.spec.from_), seconds)
        name = self._served_as["time"]
        if name in table.column_names and pa.types.is_timestamp(table[name].type):
            seconds = pc.divide(
                plain(table[name]).cast(pa.timestamp("us", "UTC")).cast(pa.int64()).cast(pa.float64()), 1e6
            )
            low, high = _wider(self.times, seconds)
            self.times = (low, high) if low <= high else None  # none is there


def _scores(column: pa.ChunkedArray, name: str) -> npt.NDArray[np.floating]:
    """The scores [N] of a log; InputError where the column, as one of raw rows may, holds something else."""
    kind = column.type
    if not pa.types.is_floating(kind) and not pa.types.is_integer(kind):
        raise InputError(f"column {name!r} stands beside this version's rows and holds {kind}, not scores")
    score_N: npt.NDArray[np.floating] = column.cast(pa.float64()).to_numpy()  # null is NaN
    if not np.all((score_N >= 0) & (score_N <= 1)):
        raise InputError(f"column {name!r} stands beside this version's rows and holds what is no score from 0 to 1")
    return score_N


def _wider(known: Range | None, seconds: pa.Array) -> Range:
    found = pc.min_max(seconds).as_py()
    low, high = found["min"], found["max"]
    if low is None:
        return known or (np.inf, -np.inf)
    return (low, high) if known is None else (min(low, known[0]), max(high, known[1]))


def _count(found_RG: CountRG, part_I: IndexN, group_I: IndexN) -> None:
    parts, groups = found_RG.shape
    found_RG += np.bincount(part_I * groups + group_I, minlength=parts * groups).reshape(parts, groups)
