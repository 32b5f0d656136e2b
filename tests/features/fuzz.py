"""Broken inputs for `prepare`: each must end in a whole data set or in one clear error, and nothing in between.

python -m tests.features.fuzz --runs 10000 --seed 1
"""

import argparse
import gzip
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from features import units
from features.dataset import PreparedDataset
from features.errors import InputError
from features.prepare import prepare
from features.schema import Schema
from features.splits import SplitRule

SCHEMA = Schema.model_validate(
    {
        "name": "fuzz",
        "label": {"column": "y", "positive": "> 0"},
        "time": "at",
        "group": "a",
        "weight": "w",
        "fields": [
            {"name": "a", "type": "categorical", "min_count": 1},
            {"name": "i", "type": "categorical", "encoder": "identity", "buckets": 9},
            {"name": "l", "type": "list", "separator": "|", "encoder": "hash", "buckets": 10},
            {"name": "n", "type": "numeric"},
            {"name": "v", "type": "numeric", "encoder": "standard"},
            {"name": "d", "type": "date", "from": "at", "part": "hour"},
            {"name": "x", "type": "cross", "of": ["a", "l"], "buckets": 10},
        ],
    }
)
_NASTY = [
    b"\0",
    b"\xff",
    b'"',
    b"\n",
    b"\r",
    b",",
    b",,",
    b"\xef\xbb\xbf",
    b"1e999",
    b"nan",
    b"-0",
    b"9" * 400,
    b"x" * 5000,
]
_NASTY += [
    b"\xed\xa0\x80",
    "\u2028".encode(),
    b"'",
    b"|",
    b"2026-13-45",
    b"inf",
    b"-1",
    b"0x10",
    b" ",
    b"\x1a",
    b"\\",
    b"#",
]


def valid_rows(random: np.random.Generator) -> pa.Table:
    """Rows that are all good."""
    count = int(random.integers(3, 40))
    numbers = random.normal(0, 10, count).round(3)
    return pa.table(
        {
            "a": [f"a{n}" for n in random.integers(0, 5, count)],
            "i": random.integers(0, 9, count),
            "l": ["|".join(f"t{n}" for n in random.integers(0, 4, size)) for size in random.integers(0, 4, count)],
            "n": numbers,
            "v": numbers[::-1].copy(),
            "y": random.integers(0, 2, count),
            "at": random.integers(0, 10**9, count),
            "w": random.random(count).round(3),
        }
    )


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """The data with a few bytes removed, doubled, changed, or nasty ones put in."""
    for _ in range(int(random.integers(1, 6))):
        at, length = int(random.integers(0, len(data) + 1)), int(random.integers(1, 30))
        kind = random.integers(0, 5)
        if kind == 0:
            data = data[:at] + data[at + length :]
        elif kind == 1:
            data = data[:at] + data[at : at + length] * 2 + data[at + length :]
        elif kind == 2 and data:
            data = data[: at - 1] + bytes([int(random.integers(0, 256))]) + data[at:]
        elif kind == 3:
            data = data[:at]
        else:
            data = data[:at] + _NASTY[int(random.integers(len(_NASTY)))] + data[at:]
    return data


def mutated_file(folder: Path, random: np.random.Generator) -> Path:
    """A file of some kind whose bytes, or whose text before it was packed, are broken."""
    table, kind = valid_rows(random), random.integers(0, 4)
    if kind == 0:
        path = folder / "a.parquet"
        pq.write_table(table, path, compression="none")
        path.write_bytes(mutate(path.read_bytes(), random))
        return path
    pacsv.write_csv(table, folder / "plain.csv")
    text = (folder / "plain.csv").read_bytes()
    (folder / "plain.csv").unlink()
    path = folder / ("a.csv.gz" if kind == 1 else "a.csv")
    if kind == 1:
        packed = gzip.compress(mutate(text, random) if random.random() < 0.5 else text)
        path.write_bytes(packed if random.random() < 0.5 else mutate(packed, random))
    else:
        path.write_bytes(mutate(text, random))
    return path


def run_once(folder: Path, random: np.random.Generator) -> str:
    """Prepare a broken file; "data" or "error", and an exception for anything else."""
    folder.mkdir()
    raw = mutated_file(folder, random)
    rule = SplitRule.parse(("time:" if random.random() < 0.5 else "random:") + "0.6,0.2,0.2")
    units.UNIT_BYTES = int(random.choice([100, 1000, 2**26]))
    try:
        done = prepare(SCHEMA, {"input": [str(raw)]}, folder / "data", split=rule, max_bad_rows=0.5)
    except InputError as error:
        if "\n" in str(error) or not str(error):
            raise AssertionError(f"not one line: {error!r}") from error
        left = [path.name for path in folder.iterdir() if path != raw]
        if left:
            raise AssertionError(f"left behind: {left}") from error
        return "error"
    dataset = PreparedDataset.open(folder / "data")
    rows = {name: dataset.split(name).num_rows for name in dataset.splits}
    if rows != done.rows:
        raise AssertionError(f"{rows} rows are not the {done.rows} that were told")
    return "data"


def fuzz(runs: int, seed: int) -> Counter[str]:
    """Prepare `runs` broken files; how many ended in data and how many in an error."""
    ended: Counter[str] = Counter()
    unit_bytes = units.UNIT_BYTES
    try:
        for run in range(runs):
            folder = Path(tempfile.mkdtemp(prefix="masknet-fuzz-"))
            try:
                ended[run_once(folder / "case", np.random.default_rng((seed, run)))] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}, run {run}: {error!r}") from error
            finally:
                shutil.rmtree(folder)
    finally:
        units.UNIT_BYTES = unit_bytes
    return ended


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    sys.stdout.write(f"{dict(fuzz(arguments.runs, arguments.seed))}\n")
