"""Hashes of short text are those of the reference implementation."""

import numpy as np
import pytest
import xxhash

from features.short_hashes import LONGEST, hash_short


@pytest.mark.parametrize("lengths", [range(17), range(1, 4), range(4, 9), range(9, 17), [16], [1], []])
def test_hashes_are_xxh3_s(lengths: list[int]) -> None:
    random = np.random.default_rng(0)
    texts = [random.bytes(length) for length in lengths for _ in range(200)]
    data = b"|".join(texts)
    length_M = np.array([len(text) for text in texts], np.int64)
    start_M = np.cumsum(length_M + 1) - length_M - 1
    expected = [xxhash.xxh3_64_intdigest(text) if text else 0 for text in texts]
    assert hash_short(data, start_M, length_M).tolist() == expected
    assert LONGEST == 16
