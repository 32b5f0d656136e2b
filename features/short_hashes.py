"""xxh3-64 of short text in NumPy, for requests.

For a few thousand values between two runs of a network, which leaves the caches cold, the call into Polars that
`features.hashing` makes costs several times these dozen operations. The formulas are those of
XXH3_len_1to3_64b, XXH3_len_4to8_64b and XXH3_len_9to16_64b (xxhash.com) with seed 0 and the default secret.

Legend: M values.
"""

import numpy as np
import numpy.typing as npt

from features.hashing import HashN

LONGEST = 16  # bytes; longer text has other formulas
StartsM = npt.NDArray[np.int64]

_SECRET = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e"
    ),
    "<u8",
)
_FLIP_4 = (_SECRET[:1] ^ _SECRET[:1] >> np.uint64(32)) & np.uint64(2**32 - 1)
_FLIP_8 = _SECRET[1:2] ^ _SECRET[2:3]
_FLIP_LOW, _FLIP_HIGH = _SECRET[3:4] ^ _SECRET[4:5], _SECRET[5:6] ^ _SECRET[6:7]
_PRIME_2, _PRIME_3 = np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9)
_MIX_4, _MIX_9 = np.uint64(0x9FB21C651E98DF25), np.uint64(0x165667919E3779F9)
_LOW = np.uint64(2**32 - 1)


def hash_short(data: bytes, start_M: StartsM, length_M: StartsM) -> HashN:
    """xxh3-64 [M] of the text at `start_M` in `data`, of 1 to 16 bytes each; 0 where it has none."""
    padded = data + bytes(8)
    word_at = np.ndarray(len(data) + 1, "<u8", padded, strides=(1,))
    word_M, size_M = word_at[start_M], length_M.view(np.uint64)
    hash_M = _up_to_8(word_M, size_M)
    shortest, longest = int(length_M.min(initial=LONGEST)), int(length_M.max(initial=0))
    if shortest < 4:
        few = np.flatnonzero(length_M < 4)
        hash_M[few] = _up_to_3(word_M[few], size_M[few])
        hash_M[length_M == 0] = 0
    if longest > 8:
        many = np.flatnonzero(length_M > 8)
        last = word_at[start_M[many] + length_M[many] - 8]
        hash_M[many] = _up_to_16(word_M[many], last, size_M[many])
    return hash_M


def _up_to_3(word_M: HashN, size_M: HashN) -> HashN:
    one, byte = np.uint64(1), np.uint64(255)
    middle_M = (word_M >> (size_M >> one << np.uint64(3))) & byte
    last_M = (word_M >> (np.maximum(size_M, one) - one << np.uint64(3))) & byte
    whole_M = (word_M & byte) << np.uint64(16) | middle_M << np.uint64(24) | last_M | size_M << np.uint64(8)
    hash_M = whole_M ^ _FLIP_4
    hash_M = (hash_M ^ hash_M >> np.uint64(33)) * _PRIME_2
    hash_M = (hash_M ^ hash_M >> np.uint64(29)) * _PRIME_3
    return hash_M ^ hash_M >> np.uint64(32)


def _up_to_8(word_M: HashN, size_M: HashN) -> HashN:
    last_M = (word_M >> ((size_M - np.uint64(4)) << np.uint64(3) & np.uint64(63))) & _LOW
    hash_M = ((word_M << np.uint64(32)) + last_M) ^ _FLIP_8
    hash_M ^= _rotated(hash_M, 49) ^ _rotated(hash_M, 24)
    hash_M *= _MIX_4
    hash_M ^= (hash_M >> np.uint64(35)) + size_M
    hash_M *= _MIX_4
    return hash_M ^ hash_M >> np.uint64(28)


def _up_to_16(first_M: HashN, last_M: HashN, size_M: HashN) -> HashN:
    low_M, high_M = first_M ^ _FLIP_LOW, last_M ^ _FLIP_HIGH
    hash_M = size_M + low_M.byteswap() + high_M + _folded_product(low_M, high_M)
    hash_M = (hash_M ^ hash_M >> np.uint64(37)) * _MIX_9
    return hash_M ^ hash_M >> np.uint64(32)


def _rotated(x_M: HashN, bits: int) -> HashN:
    return x_M << np.uint64(bits) | x_M >> np.uint64(64 - bits)


def _folded_product(x_M: HashN, y_M: HashN) -> HashN:
    """The lower 64 bits of the 128 of x · y, xor the upper 64."""
    half = np.uint64(32)
    x_low, x_high, y_low, y_high = x_M & _LOW, x_M >> half, y_M & _LOW, y_M >> half
    low, cross = x_low * y_low, x_high * y_low
    middle = (low >> half) + (cross & _LOW) + x_low * y_high
    return (x_M * y_M) ^ ((cross >> half) + (middle >> half) + x_high * y_high)
