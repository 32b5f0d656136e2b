"""The prepared data set on disk.

manifest.json      schema, pipeline digest, hashes of the raw files and of every file here
train/ valid/ test/  Parquet: encoded fields, _label, _weight, _time, _group, and _file and _line of the raw row
pipeline/          the fitted encoders
profile.json       counts per split and field
quarantine/        the rows that were set aside, with file, line, column and reason
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import InputError, one_line
from features.files import canonical_json, read_json, sha256_file
from features.pipeline import FeaturePipeline
from features.schema import Schema
from features.validation import validate

FORMAT = 2
SPLITS = ("train", "valid", "test")
LABEL, WEIGHT, TIME, GROUP, FILE, LINE = "_label", "_weight", "_time", "_group", "_file", "_line"


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file, which can be read on its own."""

    file: Path
    index: int
    rows: int


class SplitFiles:
    """The Parquet files of a split, read a row group at a time."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.row_groups = [group for file in files for group in _row_groups(file)]
        self.num_rows = sum(group.rows for group in self.row_groups)

    def read(self, group: RowGroup, columns: list[str]) -> pa.Table:
        """Columns of a row group."""
        try:
            with pq.ParquetFile(group.file) as file:
                return file.read_row_group(group.index, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"prepared data: row group {group.index} of {group.file} is damaged: {one_line(error)}"
            ) from None


def _row_groups(file: Path) -> list[RowGroup]:
    try:
        metadata = pq.read_metadata(file)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"prepared data: {file} is damaged: {one_line(error)}") from None
    return [RowGroup(file, index, metadata.row_group(index).num_rows) for index in range(metadata.num_row_groups)]


@dataclass(frozen=True)
class PreparedDataset:
    """An opened prepared data set; splits are read on demand."""

    path: Path
    manifest: dict[str, Any]
    schema: Schema
    pipeline: FeaturePipeline

    @classmethod
    def open(cls, path: Path) -> "PreparedDataset":
        """Open and check the data set at `path`.

        Raises:
            InputError: no data set is there, it is damaged, or it is of another format.
        """
        if not path.is_dir():
            raise InputError(f"prepared data {path} does not exist; `masknet prepare` makes it")
        manifest = read_json(path / "manifest.json", "prepared data")
        if not isinstance(manifest, dict) or not {"format", "schema", "pipeline_digest", "files"} <= manifest.keys():
            raise InputError(f"prepared data: {path / 'manifest.json'} is damaged: keys are missing")
        if manifest["format"] != FORMAT:
            update = "update it" if manifest["format"] > FORMAT else "prepare the data anew"
            raise InputError(
                f"prepared data {path} has format {manifest['format']}; this program reads {FORMAT}: {update}"
            )
        pipeline = FeaturePipeline.load(path / "pipeline")
        if pipeline.digest != manifest["pipeline_digest"]:
            raise InputError(f"prepared data {path} is damaged: pipeline/ is not the one in manifest.json")
        return cls(path, manifest, validate(Schema, manifest["schema"], f"prepared data {path}"), pipeline)

    @cached_property
    def digest(self) -> str:
        """Equal for data sets of the same pipeline and files."""
        return hashlib.sha256(canonical_json([self.pipeline.digest, self.manifest["files"]])).hexdigest()

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """The splits that there are: all three, unless new rows were encoded for some only."""
        return tuple(name for name in SPLITS if any(file.startswith(f"{name}/") for file in self.manifest["files"]))

    def files(self, name: str) -> SplitFiles:
        """The files of a split, checked against their hashes.

        Raises:
            InputError: there is no such split, or a file is missing or differs from its hash in the manifest.
        """
        if name not in SPLITS:
            raise InputError(f"split {name!r} is none of {', '.join(SPLITS)}")
        if name not in self.splits:
            raise InputError(f"prepared data {self.path} has no split {name!r}; it has {', '.join(self.splits)}")
        files = sorted(file for file in self.manifest["files"] if file.startswith(f"{name}/"))
        for file in files:
            path = self.path / file
            if not path.is_file():
                raise InputError(f"prepared data: {path} is missing")
            if sha256_file(path) != self.manifest["files"][file]:
                raise InputError(f"prepared data: {path} is damaged: its SHA-256 is not the one in manifest.json")
        return SplitFiles([self.path / file for file in files])

    def split(self, name: str) -> pa.Table:
        """Read a split whole; the same errors as `files`."""
        return pa.concat_tables([pq.read_table(file) for file in self.files(name).files])

    def require_pipeline(self, digest: str, model: str) -> None:
        """InputError unless this data was encoded by the pipeline with `digest`, the one of `model`."""
        if self.pipeline.digest != digest:
            raise InputError(
                f"prepared data {self.path} was encoded by another pipeline ({self.pipeline.digest[:12]}) than the one "
                f"of {model} ({digest[:12]}): give the raw rows with --input instead"
            )


def weights_of(schema: Schema, label_N: np.ndarray) -> np.ndarray | None:
    """How many rows each of a split for validation or test stands for: a negative that arrived as a share, 1 / share.

    None where every row stands for itself.
    """
    arrived = schema.already_sampled
    return None if arrived is None else np.where(label_N > 0, 1.0, 1.0 / arrived.rate)


def groups_of(table: pa.Table) -> np.ndarray | None:
    """The group of each row of a split, None for a row without one; None where the schema has no group."""
    group = table[GROUP]
    return None if group.null_count == len(group) else group.to_numpy()
