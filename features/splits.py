"""Which split a row belongs to, decided over any number of rows in bounded memory.

Every row has a 64-bit key: its time, or a hash of its file and line for a random split. The shares are cut exactly at
ranks of the keys, rows with equal keys in the order in which they were read; the ranks are found by counting the keys'
digits, 16 bits at a time.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from features.dataset import SPLITS
from features.errors import InputError
from features.hashing import mix

KeyN = npt.NDArray[np.uint64]
SplitN = npt.NDArray[np.int8]

_RULE = re.compile(r"(time|random):(\d*\.?\d+),(\d*\.?\d+),(\d*\.?\d+)")
_DIGIT_BITS = 16
_SAMPLING_SEED = 2  # not the split's, or sampling would follow the split


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """How rows without given splits are divided: by time or at random, with the shares of train, valid and test."""

    by: str
    shares: tuple[float, float, float]
    seed: int = 1

    @classmethod
    def parse(cls, text: str) -> "SplitRule":
        """Read "time:0.8,0.1,0.1" or "random:0.8,0.1,0.1"."""
        found = _RULE.fullmatch(text)
        if not found:
            raise InputError(f"--split {text!r} is not of the form time:0.8,0.1,0.1 or random:0.8,0.1,0.1")
        shares = (float(found[2]), float(found[3]), float(found[4]))
        if abs(sum(shares) - 1) > 1e-9:
            raise InputError(f"--split {text!r}: the shares add up to {sum(shares):g}, not to 1")
        return cls(by=found[1], shares=shares)


@dataclass(frozen=True)
class Cut:
    """Rows below a key go to one side, and of the rows with that very key those before a place in reading order."""

    key: np.uint64
    ties_below: int
    ties_before: npt.NDArray[np.int64]  # by unit: rows with the key in the units before

    def below(self, key_N: KeyN, unit: int) -> npt.NDArray[np.bool_]:
        """Which rows of a unit are below the cut."""
        tie_N = key_N == self.key
        place_N = int(self.ties_before[unit]) + np.cumsum(tie_N) - tie_N
        return (key_N < self.key) | (tie_N & (place_N < self.ties_below))


@dataclass(frozen=True)
class Assignment:
    """Which split each row is in: by the cuts, or given for each source."""

    cuts: tuple[Cut, ...] = ()
    of_source: tuple[int, ...] = ()

    def splits(self, key_N: KeyN, unit: int, source: int) -> SplitN:
        """The number of the split of each row of a unit (see `SPLITS`)."""
        if not self.cuts:
            return np.full(len(key_N), self.of_source[source], np.int8)
        split_N = np.full(len(key_N), len(self.cuts), np.int8)
        for number in range(len(self.cuts) - 1, -1, -1):
            split_N[self.cuts[number].below(key_N, unit)] = number
        return split_N


def time_keys(seconds_N: npt.NDArray[np.float64]) -> KeyN:
    """Unsigned numbers in the order of the times."""
    bits_N = (seconds_N + 0.0).view(np.int64)  # −0 is 0
    flipped_N = np.where(bits_N < 0, ~bits_N, bits_N | np.int64(-(2**63)))
    return flipped_N.view(np.uint64)


def random_keys(seed: int, source: int, line_N: npt.NDArray[np.int64]) -> KeyN:
    """A number for each row that depends on the seed, its file and its line alone."""
    base = mix(np.array([(seed << 32) + source + 1], np.uint64))
    return mix(line_N.astype(np.uint64) + base)


def cut_at(ranks: list[int], keys_of: Callable[[int], KeyN], units: int) -> tuple[Cut, ...]:
    """Cuts with exactly so many rows below them, for ranks from 0 to the number of rows."""
    return tuple(_cut_at(rank, keys_of, units) for rank in ranks)


def _cut_at(rank: int, keys_of: Callable[[int], KeyN], units: int) -> Cut:
    key, left = 0, rank
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = np.zeros(2**_DIGIT_BITS, np.int64)
        for key_N in _with_prefix(keys_of, units, key, shift + _DIGIT_BITS):
            digit_N = (key_N >> np.uint64(shift)) & np.uint64(2**_DIGIT_BITS - 1)
            counts += np.bincount(digit_N.astype(np.int64), minlength=2**_DIGIT_BITS)
        ends = np.cumsum(counts)
        digit = min(int(np.searchsorted(ends, left, side="right")), 2**_DIGIT_BITS - 1)
        left -= int(ends[digit] - counts[digit])
        key |= digit << shift
    ties = np.array([int((keys_of(unit) == np.uint64(key)).sum()) for unit in range(units)], np.int64)
    return Cut(np.uint64(key), left, np.cumsum(ties) - ties)


def _with_prefix(keys_of: Callable[[int], KeyN], units: int, prefix: int, bits: int) -> Iterator[KeyN]:
    """The keys whose bits from `bits` up are those of `prefix`."""
    for unit in range(units):
        key_N = keys_of(unit)
        if bits < 64:
            key_N = key_N[(key_N >> np.uint64(bits)) == np.uint64(prefix >> bits)]
        yield key_N


def ranks_of(shares: tuple[float, float, float], rows: int) -> list[int]:
    """How many rows are below each cut."""
    return [round(sum(shares[: number + 1]) * rows) for number in range(len(SPLITS) - 1)]


def sampled(rate: float, source: int, line_N: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which negatives are kept: about the share `rate`, the same ones every time."""
    if rate >= 1:
        return np.ones(len(line_N), bool)
    kept_N: npt.NDArray[np.bool_] = random_keys(_SAMPLING_SEED, source, line_N) < np.uint64(int(rate * 2**64))
    return kept_N
