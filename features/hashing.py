"""Text to 64-bit hashes, and from hashes back to ids: the two steps of every lookup, on whole columns.

The hash is xxh3-64 with seed 0 of the UTF-8 text (xxhash.com): the same number on every machine, in every version and
in other languages. Values are told apart by it: two that collide share an id; among ten million values there is one
chance in 370,000 that any two do.
"""

import numpy as np
import numpy.typing as npt
import polars as pl
import polars_hash  # noqa: F401  (registers the expressions' namespace nchash)
import pyarrow as pa

HASH_SEED = 0  # part of the format: another seed gives other ids
_HASH = pl.col("v").nchash.xxh3_64(seed=HASH_SEED)  # type: ignore[attr-defined]  # registered by polars_hash

HashN = npt.NDArray[np.uint64]
IdsN = npt.NDArray[np.int64]


def hash_text(values: pa.Array | pl.Series) -> HashN:
    """xxh3-64 of each text [N]; 0 for null, whose place the caller knows."""
    text = values if isinstance(values, pl.Series) else pl.Series(values, dtype=pl.String)
    hashes = text.alias("v").to_frame().select(_HASH).to_series()
    if hashes.null_count():
        hashes = hashes.fill_null(0)
    found: HashN = hashes.to_numpy()
    return found


def combine_hashes(parts: list[HashN]) -> HashN:
    """One hash for each tuple of hashes [N]: ((h₁ · p + h₂) · p + …) · p, finished by splitmix64's mixing."""
    combined = np.zeros(len(parts[0]), np.uint64)
    for part in parts:
        combined = (combined + part) * np.uint64(0x9E3779B97F4A7C15)
        combined ^= combined >> np.uint64(29)
    return mix(combined)


def mix(value_N: HashN) -> HashN:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014): a bijection that scrambles all bits."""
    value_N = (value_N ^ (value_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value_N = (value_N ^ (value_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value_N ^ (value_N >> np.uint64(31))


class HashIndex:
    """From the hash of a value to its id, for many values at once.

    An open-addressing table at half load, ordered by hash, of 16-byte entries: a hash and its id come from the same
    cache line, and a search ends at the first entry that is not smaller. 32 bytes per value.
    """

    def __init__(self, hash_N: HashN, id_N: npt.NDArray[np.int32], absent: int) -> None:
        """Index values by their hashes; of equal hashes the first one's id wins, and `absent` is all others' id."""
        order = np.argsort(hash_N, kind="stable")
        sorted_N = hash_N[order]
        first_N = np.append(True, sorted_N[1:] != sorted_N[:-1])[: len(sorted_N)]
        order, sorted_N = order[first_N], sorted_N[first_N]
        self._absent, self._slots = np.uint64(absent), np.uint64(max(1, 2 * len(sorted_N)))
        rank_N = np.arange(len(sorted_N))
        place_N = np.maximum.accumulate(self._slot(sorted_N) - rank_N) + rank_N  # the next free place from its slot on
        entries = np.empty((max(int(self._slots), int(place_N[-1]) + 1 if len(place_N) else 0) + 1, 2), np.uint64)
        entries[:] = np.uint64(2**64 - 1), self._absent  # free places are larger than any hash: searches end there
        entries[place_N, 0], entries[place_N, 1] = sorted_N, id_N[order]
        self._entries = entries.reshape(-1).view(np.complex128)  # 16 bytes that NumPy gathers in one go

    def _slot(self, hash_N: HashN) -> npt.NDArray[np.int64]:
        return (((hash_N >> np.uint64(32)) * self._slots) >> np.uint64(32)).view(np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes that the index holds."""
        return int(self._entries.nbytes)

    def find(self, hash_N: HashN) -> npt.NDArray[np.int32]:
        """The id of each value."""
        place_N = self._slot(hash_N)
        found_N2 = self._entries.take(place_N).view(np.uint64).reshape(-1, 2)
        id_N = np.where(found_N2[:, 0] == hash_N, found_N2[:, 1], self._absent).astype(np.int32)
        behind = np.flatnonzero(found_N2[:, 0] < hash_N)
        place, wanted = place_N.take(behind), hash_N.take(behind)
        while behind.size:
            place += 1
            found = self._entries.take(place).view(np.uint64).reshape(-1, 2)
            hit = found[:, 0] == wanted
            id_N[behind[hit]] = found[hit, 1]
            on = np.flatnonzero(found[:, 0] < wanted)
            behind, place, wanted = behind.take(on), place.take(on), wanted.take(on)
        return id_N
