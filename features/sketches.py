"""Distinct values and repeated rows of any number of rows, in memory that does not grow."""

import numpy as np
import numpy.typing as npt

from features.hashing import HashN

KEPT = 4096
_PENDING = 4 * KEPT


class DistinctSketch:
    """The KEPT smallest distinct hashes (Bar-Yossef et al., RANDOM 2002).

    Counts of distinct values are exact below KEPT and off by about 1.6 % (one standard error) beyond. Merging is
    associative and commutative.
    """

    def __init__(self) -> None:
        self._kept = np.empty(0, np.uint64)
        self._pending: list[HashN] = []
        self._pending_size = 0

    def is_wanted(self, hash_N: HashN) -> npt.NDArray[np.bool_]:
        """Which hashes could be among the kept ones."""
        return hash_N < self._kept[-1] if len(self._kept) == KEPT else np.ones(len(hash_N), bool)

    def add(self, hash_N: HashN) -> None:
        """Add values by their hashes."""
        self._pending.append(hash_N[self.is_wanted(hash_N)])
        self._pending_size += len(self._pending[-1])
        if self._pending_size > _PENDING:
            self._settle()

    def merge(self, other: "DistinctSketch") -> None:
        """Add another sketch's values."""
        self.add(other._settle())

    def _settle(self) -> HashN:
        if self._pending_size:
            self._kept = np.unique(np.concatenate([self._kept, *self._pending]))[:KEPT]
        self._pending, self._pending_size = [], 0
        return self._kept

    @property
    def distinct(self) -> int:
        """How many distinct values there were; an estimate from KEPT on."""
        kept = self._settle()
        return len(kept) if len(kept) < KEPT else round((KEPT - 1) / (float(kept[-1]) / 2.0**64))


class RepeatSketch:
    """The KEPT smallest distinct hashes and how often each occurs: what share of all values repeats another.

    Equal values have equal hashes, so the kept ones are a sample of the distinct values with all their occurrences.
    """

    def __init__(self) -> None:
        self._hashes = np.empty(0, np.uint64)
        self._counts = np.empty(0, np.int64)

    def add(self, hash_N: HashN) -> None:
        """Add values by their hashes."""
        if len(self._hashes) == KEPT:
            hash_N = hash_N[hash_N <= self._hashes[-1]]
        hashes, counts = np.unique(hash_N, return_counts=True)
        self._merge(hashes, counts)

    def merge(self, other: "RepeatSketch") -> None:
        """Add another sketch's values."""
        self._merge(other._hashes, other._counts)

    def _merge(self, hashes: HashN, counts: npt.NDArray[np.int64]) -> None:
        found, place = np.unique(np.concatenate([self._hashes, hashes]), return_inverse=True)
        sums = np.bincount(place, np.concatenate([self._counts, counts]), minlength=len(found)).astype(np.int64)
        self._hashes, self._counts = found[:KEPT], sums[:KEPT]

    @property
    def repeated(self) -> float:
        """The share of values that had occurred before; an estimate from KEPT on."""
        total = int(self._counts.sum())
        return 1.0 - len(self._counts) / total if total else 0.0
