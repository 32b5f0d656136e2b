"""A fitted pipeline on disk: pipeline.json, and a Parquet file for each vocabulary."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from features.encoders import AnyEncoder, Vocabulary, load_encoder
from features.errors import InputError, one_line
from features.fields import FieldSpec
from features.files import canonical_json, read_json, write_json

FORMAT = 2
_FIELD: TypeAdapter[FieldSpec] = TypeAdapter(FieldSpec)


class _Field(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def spec(self) -> FieldSpec: ...
    @property
    def encoder(self) -> AnyEncoder: ...
    @property
    def owner(self) -> str: ...


def digest(fields: Iterable[_Field]) -> str:
    """SHA-256 of the fields' definitions, their encoders' states and their vocabularies."""
    fields = list(fields)
    found = hashlib.sha256(canonical_json([FORMAT, _description(fields)]))
    for field in fields:
        if isinstance(field.encoder, Vocabulary) and field.owner == field.name:
            _add_text(found, field.encoder.values)
    return found.hexdigest()


def _add_text(found: Any, values: pa.Array) -> None:
    """Lengths and bytes of the values, whatever buffers they stand in."""
    lengths = pc.binary_length(values).to_numpy(zero_copy_only=False).astype("<i8")
    found.update(len(lengths).to_bytes(8, "little"))
    found.update(lengths.tobytes())
    if len(values):
        offsets = np.frombuffer(values.buffers()[1], np.int32)[values.offset : values.offset + len(values) + 1]
        data = values.buffers()[2]
        found.update(b"" if data is None else data.slice(int(offsets[0]), int(offsets[-1] - offsets[0])))


def _description(fields: list[_Field]) -> list[dict[str, Any]]:
    return [
        {"spec": field.spec.plain(), "encoder": field.encoder.kind, "state": field.encoder.state()} for field in fields
    ]


def save(folder: Path, fields: Iterable[_Field], digest: str) -> None:
    """Write the files into `folder`, which is made."""
    fields = list(fields)
    folder.mkdir(parents=True)
    for index, field in enumerate(fields):
        if isinstance(field.encoder, Vocabulary) and field.owner == field.name:
            pq.write_table(pa.table({"value": field.encoder.values}), _vocabulary(folder, index), compression="zstd")
    write_json(folder / "pipeline.json", {"format": FORMAT, "digest": digest, "fields": _description(fields)})


def load(folder: Path) -> tuple[tuple[FieldSpec, ...], dict[str, AnyEncoder], str]:
    """The fields, the encoders by the fields that own them, and the digest on record; InputError if that cannot be."""
    path = folder / "pipeline.json"
    data = read_json(path, "feature pipeline")
    try:
        if data["format"] != FORMAT:
            update = "update it" if data["format"] > FORMAT else "prepare the data anew"
            raise InputError(f"{path} has format {data['format']}; this program reads {FORMAT}: {update}")
        specs = tuple(_FIELD.validate_python(entry["spec"]) for entry in data["fields"])
        encoders = {
            spec.name: load_encoder(entry["encoder"], entry["state"], _table(folder, index))
            for index, (spec, entry) in enumerate(zip(specs, data["fields"], strict=True))
            if not getattr(spec, "share_with", None)
        }
        return specs, encoders, data["digest"]
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, OSError) as error:  # pydantic's and Arrow's are ValueErrors
        raise InputError(f"feature pipeline {folder} is damaged: {one_line(error)}") from None


def _table(folder: Path, index: int) -> pa.Table | None:
    path = _vocabulary(folder, index)
    return pq.read_table(path) if path.exists() else None


def _vocabulary(folder: Path, index: int) -> Path:
    return folder / f"{index:03d}.parquet"  # field names may hold what file names cannot
