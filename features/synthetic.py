"""Click logs in Criteo's shape from a planted model, so that the best possible scores are known.

A row has a 0/1 label, 13 counts I1…I13 and 26 categorical ids C1…C26 as 8 hexadecimal digits; ids follow a bounded Zipf
law. Its logit is a sum of one weight per id and of products ⟨u(id), v(id')⟩ over pairs of fields: what a model has to
find are multiplicative interactions. Weights and factors are hashes of (seed, field, id), so no table is kept and any
cardinality costs the same. The label is drawn from the logit, so scoring with it is the best that any model can do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as csv

from features.errors import InputError
from features.files import file_written_whole
from features.hashing import mix

SYNTHETIC = "synthetic:criteo"
SCHEMAS = Path(str(files("features.schemas")))
NUMBERS, IDS = 13, 26
BLOCK = 65_536  # rows drawn at once; a block's rows depend on the seed and the block's number alone
LARGEST = 100_000_000
# Number of distinct ids of C1…C26, scaled by what is asked for the largest; many small fields and a few huge ones
# as in Criteo's Kaggle data (github.com/openbenchmark/BARS lists 1.5 k to 10 M).
_RELATIVE = (1.5e-4, 6e-5, 1.0, 0.25, 3e-5, 2e-6, 1.2e-3, 6e-5, 3e-7, 9e-3, 5e-4, 0.8, 3e-4)
_SMALL = (26, 15_000, 0, 10, 5_600, 2_100, 4, 0, 18, 15, 0, 105, 0)  # 0: as large as asked
_ZIPF = 1.1
_FACTORS = 4
_PAIRS = tuple((first, (first + 7) % IDS) for first in range(0, IDS, 2))  # 13 pairs, so every id field is in one
_BIAS, _WEIGHT, _INTERACTION = -1.5, 0.13, 0.13
_MISSING = 0.05  # share of the values of every third field
_BINS = 20_000  # of the logit, for the AUC

IdsN = npt.NDArray[np.uint64]
FloatN = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Best:
    """What scoring with the planted probabilities gives on the rows that were drawn."""

    rows: int
    positives: int
    auc: float | None
    auc_error: float  # the AUC is binned: it is off by no more than this
    logloss: float


def cardinalities(largest: int) -> tuple[int, ...]:
    """How many distinct ids C1…C26 can take when the largest field takes `largest`."""
    if not 1000 <= largest <= LARGEST:
        raise InputError(f"the largest cardinality is {largest}; it must be from 1000 to {LARGEST}")
    first = tuple(max(4, round(largest * share)) for share in _RELATIVE)
    return first + tuple(min(size or largest, largest) for size in _SMALL)


def write_criteo(path: Path, rows: int, *, seed: int = 1, largest: int = 1_000_000) -> Best:
    """Write `rows` rows as headerless TSV (Criteo's layout) and return the best possible metrics on them.

    Args:
        path: the file, which appears when it is whole.
        rows: how many; memory does not depend on it.
        seed: equal seeds and cardinalities give equal files, and a longer file begins with the shorter one.
        largest: distinct ids of the largest field, up to 100 million.
    """
    sizes = cardinalities(largest)
    tally = _Tally()
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_written_whole(path) as aside, aside.open("wb") as file:
        for table, logit_B in blocks(rows, seed, sizes):
            label_B = table["label"].to_numpy()
            tally.add(logit_B, label_B)
            options = csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
            csv.write_csv(table, file, options)
    return tally.best()


def blocks(rows: int, seed: int, sizes: tuple[int, ...]) -> Iterator[tuple[pa.Table, FloatN]]:
    """Tables of up to 65,536 rows, and the logits that their labels were drawn from."""
    for number, start in enumerate(range(0, rows, BLOCK)):
        random = np.random.Generator(np.random.Philox(key=[seed, number]))
        drawn, logit_B = _draw(random, seed, sizes)  # always a whole block, so that a prefix is a prefix
        yield drawn.slice(0, rows - start), logit_B[: rows - start]


def _draw(random: np.random.Generator, seed: int, sizes: tuple[int, ...]) -> tuple[pa.Table, FloatN]:
    ids = [_zipf(random.random(BLOCK), size) for size in sizes]
    hashes = [mix(rank_B + np.uint64((seed << 40) + (field << 34))) for field, rank_B in enumerate(ids)]
    logit_B = np.full(BLOCK, _BIAS)
    for hash_B in hashes:
        logit_B += _WEIGHT * _centred(hash_B, 0)
    for first, second in _PAIRS:
        for factor in range(1, 1 + _FACTORS):
            logit_B += _INTERACTION * _centred(hashes[first], factor) * _centred(hashes[second], factor)
    counts = np.floor(random.lognormal(1.0, 1.5, (NUMBERS, BLOCK)))
    logit_B += 0.15 * (np.log1p(counts[:4]) - 1.2).sum(0)
    columns = {"label": pa.array((random.random(BLOCK) < 1 / (1 + np.exp(-logit_B))).astype(np.int8))}
    for index in range(NUMBERS):
        absent_B = random.random(BLOCK) < _MISSING if index >= 4 and index % 3 == 0 else None
        columns[f"I{index + 1}"] = pa.array(counts[index].astype(np.int64), mask=absent_B)
    for field, rank_B in enumerate(ids):
        columns[f"C{field + 1}"] = _hexadecimal(rank_B, field)
    return pa.table(columns), logit_B


def _zipf(uniform_B: FloatN, size: int) -> IdsN:
    """Ranks from 0 to size − 1 with probability about proportional to (rank + 1)^−1.1, by inverting the integral."""
    power = 1.0 - _ZIPF
    rank_B = (uniform_B * ((size + 1.0) ** power - 1.0) + 1.0) ** (1.0 / power)
    return np.minimum(rank_B.astype(np.uint64) - np.uint64(1), np.uint64(size - 1))


def _centred(hash_B: IdsN, which: int) -> FloatN:
    """A number of mean 0 and variance 1 for each hash, uniform, from 12 of its bits."""
    bits_B = (hash_B >> np.uint64(12 * which)) & np.uint64(4095)
    return (bits_B.astype(np.float64) / 4095 - 0.5) * np.sqrt(12.0)


def _hexadecimal(rank_B: IdsN, field: int) -> pa.Array:
    """8 digits for each rank, different for different ranks, without order."""
    scrambled = ((rank_B + np.uint64(field << 27)) * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)
    shifts = np.arange(28, -1, -4, dtype=np.uint64)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)[((scrambled[:, None] >> shifts) & np.uint64(15)).astype(int)]
    offsets = np.arange(0, 8 * len(rank_B) + 1, 8, dtype=np.int32)
    return pa.StringArray.from_buffers(len(rank_B), pa.py_buffer(offsets), pa.py_buffer(digits.tobytes()))


class _Tally:
    """Logloss and AUC of the planted logits, in memory that does not grow."""

    def __init__(self) -> None:
        self._loss, self._bins = 0.0, np.zeros((2, _BINS), np.int64)

    def add(self, logit_B: FloatN, label_B: npt.NDArray[np.int8]) -> None:
        self._loss += float(np.logaddexp(0.0, np.where(label_B > 0, -logit_B, logit_B)).sum())
        bin_B = np.clip((logit_B + 10.0) * (_BINS / 20.0), 0, _BINS - 1).astype(np.int64)
        for label in (0, 1):
            self._bins[label] += np.bincount(bin_B[label_B == label], minlength=_BINS)

    def best(self) -> Best:
        negatives, positives = (int(total) for total in self._bins.sum(1))
        below = np.cumsum(self._bins[0]) - self._bins[0]
        ties = float((self._bins[0] * self._bins[1]).sum())
        wins = float((below * self._bins[1]).sum()) + ties / 2
        pairs = positives * negatives
        auc, error = (wins / pairs, ties / 2 / pairs) if pairs else (None, 0.0)
        rows = positives + negatives
        return Best(rows, positives, auc, error, self._loss / rows if rows else 0.0)
