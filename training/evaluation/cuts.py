"""Rows cut into parts by the values of a field, or by their time.

Legend: N rows, I items (a row's single value, or those of its list), K parts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from features.arrays import flat_values
from features.dataset import TIME
from features.encoders import FIRST, MISSING, UNKNOWN, Hash, LogBucket, Managed, Quantile, Scale
from features.id_maps import IdMap
from features.pipeline import FittedField
from training.evaluation.names import Known, hashed_names, range_name, unknown_name, value_of
from training.evaluation.results import SliceKind

IndexN = npt.NDArray[np.int64]
NumberN = npt.NDArray[Any]
DAYS = 14  # rows of at most so many days are cut by day
_PERIODS = 4
_DAY = 86_400


@dataclass(frozen=True)
class Cut:
    """Parts of the rows by one field: their kinds and names [K], and which of them each item belongs to (−1: none).

    `row_I` is the row of each item of a list field, and None where every row is one item.
    """

    field: str
    kinds: list[SliceKind]
    names: list[str]
    part_I: npt.NDArray[np.int16]
    row_I: IndexN | None = None

    def parts(self) -> Iterator[tuple[SliceKind, str, IndexN]]:
        """Kind, name and rows of each part, in the parts' order; a row that has a value twice is there once."""
        item_I = np.argsort(self.part_I, kind="stable")
        ends = np.searchsorted(self.part_I[item_I], np.arange(len(self.names) + 1))
        for number, (kind, name) in enumerate(zip(self.kinds, self.names, strict=True)):
            row_P = item_I[ends[number] : ends[number + 1]]
            if self.row_I is not None:
                row_P = self.row_I[row_P]  # in order, so the same row follows itself
                row_P = row_P[np.diff(row_P, prepend=-1) > 0]
            yield kind, name, row_P


def items_of(
    field: FittedField, table: pa.Table, id_maps: Mapping[str, IdMap]
) -> tuple[npt.NDArray[np.integer], IndexN | None]:
    """Ids [I] of a field, and their rows where it is a list; managed ids that have no row are the never seen."""
    values, length_N = flat_values(table[field.name].combine_chunks())
    ids_I = values.to_numpy(zero_copy_only=False)
    if field.is_managed:
        ids_I = np.where(id_maps[field.owner].rows(ids_I) == UNKNOWN, UNKNOWN, ids_I)
    return ids_I, None if length_N is None else np.repeat(np.arange(len(length_N)), length_N)


def by_value(field: FittedField, table: pa.Table, id_maps: Mapping[str, IdMap], known: Known, top: int) -> Cut:
    """The field's most frequent `top` values, or as many ranges of its numbers; the missing, and the never seen.

    Ids that are hashes are told by the values in `known`; crosses, whose ids have no names, have no values here.
    """
    if isinstance(field.encoder, Scale):
        value_N = table[field.name].to_numpy()
        return _by_range(field, value_N, np.isnan(value_N), top)
    ids_I, row_I = items_of(field, table, id_maps)
    if isinstance(field.encoder, (Quantile, LogBucket)):
        return _by_range(field, ids_I, ids_I == MISSING, top)
    names = _frequent(field, ids_I, known, top)
    ids = np.array([*names, MISSING, UNKNOWN])
    order = np.argsort(ids)
    place_I = np.searchsorted(ids[order], ids_I).clip(max=len(ids) - 1)
    part_I = np.where(ids[order][place_I] == ids_I, order.astype(np.int16)[place_I], np.int16(-1))
    kinds: list[SliceKind] = ["value"] * len(names)
    texts = [f"{field.name} = {name}" for name in names.values()]
    texts += [f"{field.name}: missing", unknown_name(field)]
    return Cut(field.name, [*kinds, "missing", "unknown"], texts, part_I, row_I)


def _frequent(field: FittedField, ids_I: npt.NDArray[np.integer], known: Known, top: int) -> dict[int, str]:
    """Names of the most frequent ids that have one, the most frequent first."""
    counts = pl.Series("id", ids_I).value_counts().filter(pl.col("id") >= FIRST)
    hashed = hashed_names(field, known.get(field.name, ()))
    if isinstance(field.encoder, (Hash, Managed)):
        counts = counts.filter(pl.col("id").is_in(list(hashed)))
    ids = counts.sort(["count", "id"], descending=[True, False])["id"].head(top).to_list()
    return {id_: hashed.get(id_) or value_of(field, id_) for id_ in ids}


def _by_range(field: FittedField, number_N: NumberN, missing_N: npt.NDArray[np.bool_], most: int) -> Cut:
    """Ranges of about equally many rows, in their order; every range begins with a number that occurs."""
    given = number_N[~missing_N]
    starts = np.unique(given)
    if len(starts) > most:
        starts = np.unique([given.min(), *np.quantile(given, np.arange(1, most) / most, method="lower")])
    cuts = starts[1:]
    if isinstance(field.encoder, LogBucket):
        cuts = cuts[cuts != LogBucket.ABOVE_TWO]
    part_N = np.where(missing_N, len(cuts) + 1, np.searchsorted(cuts, number_N, side="right")).astype(np.int16)
    bounds = [None, *cuts.tolist(), None]
    names = [range_name(field, low, high) for low, high in pairwise(bounds)]
    kinds: list[SliceKind] = ["value"] * len(names)
    return Cut(field.name, [*kinds, "missing"], [*names, f"{field.name}: missing"], part_N)


def by_time(table: pa.Table) -> Cut | None:
    """Days (UTC) where there are two to fourteen, else quarters of the rows; None unless there are two times."""
    if table[TIME].null_count:
        return None
    second_N = table[TIME].to_numpy()
    day_N = np.floor(second_N / _DAY).astype(np.int64)
    days = np.unique(day_N)
    if 1 < len(days) <= DAYS:
        names = [datetime.fromtimestamp(day * _DAY, UTC).date().isoformat() for day in days.tolist()]
        part_N = np.searchsorted(days, day_N)
    else:
        levels = np.arange(1, _PERIODS) / _PERIODS
        starts = np.unique([second_N.min(), *np.quantile(second_N, levels, method="higher")])
        part_N = np.searchsorted(starts, second_N, side="right") - 1
        ends = [second_N[part_N == number].max() for number in range(len(starts))]
        names = [f"{_minute(start)} to {_minute(end)} UTC" for start, end in zip(starts, ends, strict=True)]
    kinds: list[SliceKind] = ["time"] * len(names)
    return Cut("time", kinds, names, part_N.astype(np.int16)) if len(names) > 1 else None


def _minute(second: float) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%d %H:%M")
