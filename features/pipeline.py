"""The fitted feature pipeline: the one way from raw rows to ids, in training, batch scoring and online."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from features.columns import Rows, as_table, canonical
from features.encoders import ENCODERS, MISSING, UNKNOWN, Encoder, fit_encoder
from features.errors import InputError
from features.files import canonical_json, read_json, write_json
from features.schema import FieldSpec, ListField, NumericField, Schema

FORMAT = 1
_FIELD: TypeAdapter[FieldSpec] = TypeAdapter(FieldSpec)


@dataclass(frozen=True)
class FittedField:
    """One field of the model, in the order of F: its definition and its fitted encoder."""

    spec: FieldSpec
    encoder: Encoder

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pooling(self) -> Literal["sum", "mean"]:
        """How a row's embeddings become one: 'mean' or 'sum'; of no consequence for single values."""
        return self.spec.pooling if isinstance(self.spec, ListField) else "sum"

    def encode(self, column: pa.Array) -> pa.Array:
        """int64 [N], or list<int64> [N] for a list field, whose missing and empty lists are the missing id alone."""
        if not isinstance(self.spec, ListField):
            return pa.array(self.encoder.encode(column))
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        ids = self.encoder.encode(pc.list_flatten(column))
        empty_N = lengths == 0
        starts = np.concatenate([[0], np.cumsum(lengths)])
        filled = np.insert(ids, starts[:-1][empty_N], MISSING)
        offsets = np.concatenate([[0], np.cumsum(np.where(empty_N, 1, lengths))])
        return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(filled)).cast(pa.list_(pa.int64()))


@dataclass(frozen=True)
class FeaturePipeline:
    """Fitted fields. Equal digests mean equal ids for equal rows."""

    fields: tuple[FittedField, ...]

    @classmethod
    def fit(cls, schema: Schema, canonical_rows: pa.Table) -> "FeaturePipeline":
        """Fit every encoder on the training split's canonical columns (see `features.columns.canonical`)."""
        fitted = []
        for spec in schema.fields:
            column = canonical_rows[spec.name].combine_chunks()
            values = pc.list_flatten(column) if isinstance(spec, ListField) else column
            fitted.append(FittedField(spec, fit_encoder(spec, values)))
        return cls(tuple(fitted))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(field.name for field in self.fields)

    def encode(self, rows: Rows) -> pa.Table:
        """Ids of raw rows, one column per field in the pipeline's order.

        Raises:
            InputError: a field's column is missing, or a value cannot be what the field says; names field and row.
        """
        table = as_table(rows)
        columns = {}
        for field in self.fields:
            values, bad_N = canonical(table, field.spec)
            if bad_N is not None:
                row = int(bad_N.argmax())
                raise InputError(f"row {row}, column {field.name!r}: {table[field.name][row]} is not a finite number")
            columns[field.name] = field.encode(values)
        return pa.table(columns)

    def encode_canonical(self, canonical_rows: pa.Table) -> pa.Table:
        """The same for columns that are canonical already."""
        return pa.table({f.name: f.encode(canonical_rows[f.name].combine_chunks()) for f in self.fields})

    @property
    def hides(self) -> bool:
        """Whether `hide_some` changes anything."""
        return any(getattr(field.spec, "unknown_rate", 0.0) > 0 for field in self.fields)

    def hide_some(self, encoded: pa.Table, seed: int) -> pa.Table:
        """Replace the share `unknown_rate` of each field's ids by the never-seen id, so that training learns it."""
        for index, field in enumerate(self.fields):
            rate = 0.0 if isinstance(field.spec, NumericField) else field.spec.unknown_rate
            if rate > 0:
                column = encoded[field.name].combine_chunks()
                is_list = isinstance(field.spec, ListField)
                ids = (column.values if is_list else column).to_numpy()
                hidden = np.random.default_rng((seed, index)).random(len(ids)) < rate
                shown = pa.array(np.where(hidden, UNKNOWN, ids))
                shown = pa.ListArray.from_arrays(column.offsets, shown) if is_list else shown
                encoded = encoded.set_column(index, field.name, shown)
        return encoded

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides an id."""
        digest = hashlib.sha256(canonical_json([FORMAT, self._description()]))
        for field in self.fields:
            table = field.encoder.table()
            if table is not None:
                digest.update(hashlib.sha256(canonical_json(table.to_pydict())).digest())
        return digest.hexdigest()

    def _description(self) -> list[dict[str, Any]]:
        return [
            {"spec": field.spec.model_dump(mode="json"), "encoder": field.encoder.kind, "state": field.encoder.state()}
            for field in self.fields
        ]

    def save(self, folder: Path) -> None:
        """Write pipeline.json and one Parquet file per vocabulary into `folder`, which is made."""
        folder.mkdir(parents=True)
        for index, field in enumerate(self.fields):
            table = field.encoder.table()
            if table is not None:
                pq.write_table(table, folder / _vocabulary_file(index))
        write_json(folder / "pipeline.json", {"format": FORMAT, "digest": self.digest, "fields": self._description()})

    @classmethod
    def load(cls, folder: Path) -> "FeaturePipeline":
        """Read a saved pipeline.

        Raises:
            InputError: a file is missing or damaged, or the format is newer than this program.
        """
        path = folder / "pipeline.json"
        data = read_json(path, "feature pipeline")
        try:
            if data["format"] > FORMAT:
                raise InputError(f"{path} has format {data['format']}; this program reads up to {FORMAT}: update it")
            pipeline = cls(tuple(_load_field(folder, i, entry) for i, entry in enumerate(data["fields"])))
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, OSError) as error:  # pydantic's and Arrow's are ValueErrors
            raise InputError(f"feature pipeline {folder} is damaged: {' '.join(str(error).split())}") from None
        if pipeline.digest != data.get("digest"):
            raise InputError(f"feature pipeline {folder} is damaged: its content does not match its digest")
        return pipeline


def _vocabulary_file(index: int) -> str:
    return f"{index:03d}.parquet"  # field names may hold what file names cannot


def _load_field(folder: Path, index: int, entry: dict[str, Any]) -> FittedField:
    path = folder / _vocabulary_file(index)
    table = pq.read_table(path) if path.exists() else None
    encoder = ENCODERS[entry["encoder"]].from_state(entry["state"], table)
    return FittedField(_FIELD.validate_python(entry["spec"]), encoder)
