"""The prepared data set on disk.

manifest.json      schema, pipeline digest, hashes of the raw files and of every file here
train/ valid/ test/  Parquet: encoded fields, _label, _weight, _time, _group, and _file and _line of the raw row
pipeline/          the fitted encoders
profile.json       counts per split and field
quarantine/        the rows that were set aside, with file, line, column and reason
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import InputError
from features.files import read_json, sha256_file
from features.pipeline import FeaturePipeline
from features.schema import Schema
from features.validation import validate

FORMAT = 1
SPLITS = ("train", "valid", "test")


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
            InputError: no data set is there, it is damaged, or it is of a newer format.
        """
        if not path.is_dir():
            raise InputError(f"prepared data {path} does not exist; `masknet prepare` makes it")
        manifest = read_json(path / "manifest.json", "prepared data")
        if not isinstance(manifest, dict) or not {"format", "schema", "pipeline_digest", "files"} <= manifest.keys():
            raise InputError(f"prepared data: {path / 'manifest.json'} is damaged: keys are missing")
        if manifest["format"] > FORMAT:
            raise InputError(f"prepared data {path} has format {manifest['format']}; this program reads up to {FORMAT}")
        pipeline = FeaturePipeline.load(path / "pipeline")
        if pipeline.digest != manifest["pipeline_digest"]:
            raise InputError(f"prepared data {path} is damaged: pipeline/ is not the one in manifest.json")
        return cls(path, manifest, validate(Schema, manifest["schema"], f"prepared data {path}"), pipeline)

    def split(self, name: str) -> pa.Table:
        """Read a split whole.

        Raises:
            InputError: there is no such split, or a file is missing or differs from its hash in the manifest.
        """
        if name not in SPLITS:
            raise InputError(f"split {name!r} is none of {', '.join(SPLITS)}")
        files = sorted(file for file in self.manifest["files"] if file.startswith(f"{name}/"))
        for file in files:
            path = self.path / file
            if not path.is_file():
                raise InputError(f"prepared data: {path} is missing")
            if sha256_file(path) != self.manifest["files"][file]:
                raise InputError(f"prepared data: {path} is damaged: its SHA-256 is not the one in manifest.json")
        return pa.concat_tables([pq.read_table(self.path / file) for file in files])

    def require_pipeline(self, digest: str, model: str) -> None:
        """InputError unless this data was encoded by the pipeline with `digest`, the one of `model`."""
        if self.pipeline.digest != digest:
            raise InputError(
                f"prepared data {self.path} was encoded by another pipeline ({self.pipeline.digest[:12]}) than the one "
                f"of {model} ({digest[:12]}): give the raw rows with --input instead"
            )
