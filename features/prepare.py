"""Raw files into a prepared data set: check, split, fit on the training split, encode, write."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.checks import FILE, GROUP, LABEL, LINE, TIME, WEIGHT, check_sources, quarantine_table
from features.dataset import FORMAT, SPLITS
from features.errors import InputError
from features.files import folder_written_whole, hash_tree, require_absent, sha256_file, write_json
from features.pipeline import FeaturePipeline
from features.profile import profile
from features.schema import Schema
from features.sources import BadRow, refuse_twice

ROW_GROUP = 65_536
UNKNOWN_SEED = 1
_SPLIT = re.compile(r"(time|random):(\d*\.?\d+),(\d*\.?\d+),(\d*\.?\d+)")


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """How rows without given splits are divided: by time or at random, with the shares of train, valid and test."""

    by: str
    shares: tuple[float, float, float]
    seed: int = 1

    @classmethod
    def parse(cls, text: str) -> "SplitRule":
        """Read "time:0.8,0.1,0.1" or "random:0.8,0.1,0.1"."""
        found = _SPLIT.fullmatch(text)
        if not found:
            raise InputError(f"--split {text!r} is not of the form time:0.8,0.1,0.1 or random:0.8,0.1,0.1")
        shares = (float(found[2]), float(found[3]), float(found[4]))
        if abs(sum(shares) - 1) > 1e-9:
            raise InputError(f"--split {text!r}: the shares add up to {sum(shares):g}, not to 1")
        return cls(by=found[1], shares=shares)

    def apply(self, table: pa.Table, schema: Schema) -> dict[str, pa.Table]:
        """Split canonical rows; by time they are ordered first, ties in the order in which they were read."""
        if self.by == "random":
            order = np.random.default_rng(self.seed).permutation(table.num_rows)
        elif schema.time is None:
            raise InputError("--split time:… needs the schema's key time, the column to order the rows by")
        else:
            order = np.argsort(table[TIME].to_numpy(), kind="stable")
        ends = np.round(np.cumsum((0.0, *self.shares)) * table.num_rows).astype(int)
        return {name: table.take(order[ends[i] : ends[i + 1]]) for i, name in enumerate(SPLITS)}


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did, for its report."""

    out: Path
    rows: dict[str, int]
    bad_rows: int
    profile: dict[str, Any]


def prepare(
    schema: Schema,
    sources: dict[str, list[str]],
    out: Path,
    *,
    split: SplitRule | None = None,
    max_bad_rows: float = 0.01,
    progress: Callable[[str], None] = lambda stage: None,
) -> Prepared:
    """Write the prepared data set `out` (see `features.dataset`).

    Args:
        schema: what the columns mean.
        sources: files by split, or all of them under "input" together with `split`.
        out: a folder that does not exist yet; it appears only when it is whole.
        split: how to divide "input".
        max_bad_rows: the largest share of bad rows that is set aside rather than refused.
        progress: called with the name of each stage as it starts.
    """
    require_absent(out)
    bad_rows: list[BadRow] = []
    files: list[Path] = []
    tables: dict[str, pa.Table] = {}
    for name, paths in sources.items():
        progress(f"reading {name}")
        table, bad, found = check_sources(paths, schema, max_bad_rows)
        tables[name] = table.set_column(table.column_names.index(FILE), FILE, _shift(table[FILE], len(files)))
        bad_rows += bad
        files += found
        refuse_twice(files)
    if split:
        progress("splitting")
        tables = split.apply(tables["input"], schema)
    for name in SPLITS:
        if name not in tables or tables[name].num_rows == 0:
            raise InputError(f"split {name!r} is empty: every split needs rows")
    progress("fitting")
    pipeline = FeaturePipeline.fit(schema, tables["train"])
    progress("encoding")
    encoded = {name: pipeline.encode_canonical(table) for name, table in tables.items()}
    encoded["train"] = pipeline.hide_some(encoded["train"], UNKNOWN_SEED)
    facts = profile(pipeline, {name: (tables[name], encoded[name]) for name in SPLITS})
    progress("writing")
    with folder_written_whole(out) as folder:
        for name in SPLITS:
            _write_split(folder / name, tables[name], encoded[name])
        pipeline.save(folder / "pipeline")
        (folder / "quarantine").mkdir()
        pq.write_table(quarantine_table(bad_rows), folder / "quarantine" / "rows.parquet")
        write_json(folder / "profile.json", facts)
        write_json(folder / "manifest.json", _manifest(schema, pipeline, files, folder))
    rows = {name: tables[name].num_rows for name in SPLITS}
    return Prepared(out, rows, len(bad_rows), facts)


def _shift(file_N: pa.ChunkedArray, by: int) -> pa.Array:
    return pa.array(file_N.to_numpy() + np.int32(by))


def _write_split(folder: Path, canonical: pa.Table, encoded: pa.Table) -> None:
    folder.mkdir()
    for name in (LABEL, WEIGHT, TIME, GROUP, FILE, LINE):
        encoded = encoded.append_column(name, canonical[name])
    pq.write_table(encoded, folder / "part-00000.parquet", row_group_size=ROW_GROUP, compression="zstd")


def _manifest(schema: Schema, pipeline: FeaturePipeline, raw: list[Path], folder: Path) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "schema": schema.model_dump(mode="json", exclude_unset=True),
        "pipeline_digest": pipeline.digest,
        "raw_files": [{"path": str(path), "sha256": sha256_file(path)} for path in raw],
        "files": hash_tree(folder),
    }
