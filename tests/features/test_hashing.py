"""The index behind every lookup, against a dictionary, where its entries crowd and where they do not."""

import numpy as np
import pytest

from features.hashing import HashIndex


@pytest.mark.parametrize("size", [0, 1, 2, 300, 3000])
@pytest.mark.parametrize("bits", [64, 34, 8])
def test_the_index_finds_what_a_dictionary_finds(size: int, bits: int) -> None:
    random = np.random.default_rng((size, bits))
    # few distinct leading bits put many hashes into the same place, also at the table's very end
    drawn = random.integers(0, 2**63, (2, size + 1000), dtype=np.uint64) * np.uint64(2)
    known, asked = drawn | np.uint64(2**64 - 2**bits) if bits < 64 else drawn
    known, ids = known[:size], np.arange(2, size + 2, dtype=np.int32)
    asked = random.permutation(np.concatenate([known, asked, known[: size // 2]]))
    first: dict[int, int] = {}
    for value, number in zip(known.tolist(), ids.tolist(), strict=True):
        first.setdefault(value, number)
    found = HashIndex(known, ids, absent=1).find(asked)
    assert found.tolist() == [first.get(value, 1) for value in asked.tolist()]
