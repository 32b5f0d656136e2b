"""Crossed fields: the ids of combinations of values.

Legend: N rows, M items of a field: N, or as many as its lists hold. One row stands for all where others have N.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from features.encoders import MISSING, Cross, Ids, Managed
from features.hashing import HashN, combine_hashes, mix

BoolM = npt.NDArray[np.bool_]


class Part(NamedTuple):
    """A crossed field: its values' hashes, which are missing, and for lists how many each row has."""

    hash_M: HashN
    missing_M: BoolM
    lengths_N: Ids | None = None

    @classmethod
    def of_ids(cls, ids_N: npt.NDArray[np.integer]) -> "Part":
        """Of a field that is no text, whose ids count."""
        return cls(mix(ids_N.astype(np.uint64) + np.uint64(1)), ids_N == MISSING)

    @property
    def rows(self) -> int:
        return len(self.hash_M if self.lengths_N is None else self.lengths_N)


def cross_ids(encoder: Cross | Managed, parts: list[Part]) -> tuple[Ids, Ids | None]:
    """Ids of the parts' combinations, one for each item of the list where one part is a list, and the lists' lengths.

    A text value counts by its hash, any other by its id. Where a part is missing, so is the combination.
    """
    rows = next((part.rows for part in parts if part.rows != 1), 1)
    lengths = next((_lengths(part, rows) for part in parts if part.lengths_N is not None), None)
    spread = [_spread(part, rows, lengths) for part in parts]
    ids = encoder.encode(combine_hashes([hash_M for hash_M, _ in spread]))
    missing_M = spread[0][1]
    for _, other_M in spread[1:]:
        missing_M = missing_M | other_M
    ids[np.broadcast_to(missing_M, ids.shape)] = MISSING
    return ids, lengths


def _lengths(part: Part, rows: int) -> Ids | None:
    return part.lengths_N if part.rows == rows else np.repeat(part.lengths_N, rows)  # type: ignore[arg-type]


def _spread(part: Part, rows: int, lengths: Ids | None) -> tuple[HashN, BoolM]:
    """Hashes and gaps, one for each item; or one for all."""
    if part.lengths_N is not None:
        times = 1 if part.rows == rows else rows
        return np.tile(part.hash_M, times), np.tile(part.missing_M, times)
    if lengths is None or part.rows != rows:
        return part.hash_M, part.missing_M
    return np.repeat(part.hash_M, lengths), np.repeat(part.missing_M, lengths)
