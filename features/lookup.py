"""All vocabularies of a pipeline behind one index, so that a request's values are looked up together."""

import numpy as np
import numpy.typing as npt

from features.encoders import FIRST, UNKNOWN, Vocabulary
from features.hashing import HashIndex, HashN, hash_text, mix

IdN = npt.NDArray[np.int32]


class Lookup:
    """Finds the ids of hashed values in numbered vocabularies."""

    def __init__(self, vocabularies: list[Vocabulary]) -> None:
        # what tells equal values of different vocabularies apart
        self.salts = mix(np.arange(1, len(vocabularies) + 1, dtype=np.uint64))
        hashes = [hash_text(v.values) ^ salt for v, salt in zip(vocabularies, self.salts, strict=True)]
        ids = [np.arange(FIRST, FIRST + len(hash_V), dtype=np.int32) for hash_V in hashes]
        nothing = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
        self._index = HashIndex(np.concatenate(hashes or nothing[0]), np.concatenate(ids or nothing[1]), UNKNOWN)

    @property
    def nbytes(self) -> int:
        """Bytes of the index, beside the vocabularies' values."""
        return self._index.nbytes

    def of_salted(self, hash_N: HashN) -> IdN:
        """Ids of hashed values, each with its vocabulary's salt (xor); none of the values is missing."""
        return self._index.find(hash_N)

    def find(self, asked: list[tuple[int, HashN]]) -> list[IdN]:
        """Ids of hashed values, for each pair of a vocabulary's number and hashes; none of the values is missing."""
        if not asked:
            return []
        counts = [len(hash_N) for _, hash_N in asked]
        salt_N = np.repeat(self.salts[[number for number, _ in asked]], counts)
        id_N = self._index.find(np.concatenate([hash_N for _, hash_N in asked]) ^ salt_N)
        ends = np.cumsum(counts).tolist()
        return [id_N[end - count : end] for end, count in zip(ends, counts, strict=True)]
