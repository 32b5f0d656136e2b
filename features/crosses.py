"""Crossed fields: the ids of combinations of values."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.encoders import MISSING, Cross, Ids, Managed
from features.hashing import HashN, combine_hashes, mix

# name, hashes of the values (text fields), ids (all others), the values, and their lengths per row (lists)
Part = tuple[str, HashN | None, npt.NDArray[np.integer] | None, pa.Array, Ids | None]


def cross_ids(encoder: Cross | Managed, parts: list[Part]) -> tuple[Ids, Ids | None]:
    """Ids of the parts' combinations, one for each item of the list where one part is a list, and the lists' lengths.

    A text value counts by its hash, any other by its id. Where a part is missing, so is the combination.
    """
    lengths = next((lengths for *_, lengths in parts if lengths is not None), None)
    hashes, missing = [], []
    for _, hash_N, ids_N, values, own_lengths in parts:
        if hash_N is not None:
            missing_N = values.is_null().to_numpy(zero_copy_only=False)
        else:
            assert ids_N is not None  # a field has ids unless it is hashed
            hash_N, missing_N = mix(ids_N.astype(np.uint64) + np.uint64(1)), ids_N == MISSING
        if lengths is not None and own_lengths is None:
            hash_N, missing_N = np.repeat(hash_N, lengths), np.repeat(missing_N, lengths)
        hashes.append(hash_N)
        missing.append(missing_N)
    ids = encoder.encode(combine_hashes(hashes))
    ids[np.logical_or.reduce(missing)] = MISSING
    return ids, lengths
