"""The fitted feature pipeline: the one way from raw rows to ids and values, in training, batch scoring and online."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features import pipeline_files
from features.arrays import as_column, flat_values, texts_at_once, with_missing
from features.columns import Canonical, Rows, as_table, canonical, column_of, with_default
from features.crosses import Part, cross_ids
from features.encoders import AnyEncoder, Cross, Hash, Identity, Managed, Scale, Vocabulary
from features.errors import InputError
from features.fields import CategoricalField, CrossField, DateField, FieldSpec, ListField
from features.hashing import HashN, hash_text
from features.lookup import Lookup
from features.utf8 import shown

LengthsN = npt.NDArray[np.int64]
_HASHED = (Vocabulary, Hash, Managed)  # encoders that see hashes of text


@dataclass(frozen=True)
class FittedField:
    """One field of the model, in the order of F: its definition, its fitted encoder, and where it shares a table."""

    spec: FieldSpec
    encoder: AnyEncoder
    owner: str  # the field whose encoder and table this one uses; itself, unless it shares
    pooling: Literal["sum", "mean"]  # how a row's embeddings become one; of no consequence for single values
    is_list: bool

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def is_value(self) -> bool:
        """Whether the field is a number to the model and not an id."""
        return isinstance(self.encoder, Scale)

    @property
    def is_managed(self) -> bool:
        """Whether the field's ids are hashes that a map gives rows (`features.id_maps`)."""
        return isinstance(self.encoder, Managed)

    @property
    def normalize(self) -> bool:
        """Whether the field's embedding goes through LN_EMB."""
        return not self.is_value or bool(getattr(self.spec, "normalize", None))


@dataclass(frozen=True)
class Layout:
    """The names of the fields with ids and of those with values, each in the order of F."""

    ids: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True)
class FeaturePipeline:
    """Fitted fields. Equal digests mean equal ids and values for equal rows."""

    fields: tuple[FittedField, ...]

    @classmethod
    def build(cls, specs: tuple[FieldSpec, ...], encoders: dict[str, AnyEncoder]) -> "FeaturePipeline":
        """Put fields together with fitted encoders, which are given by the field that owns them."""
        by_name = {spec.name: spec for spec in specs}
        return cls(tuple(_fitted(spec, encoders, by_name) for spec in specs))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(field.name for field in self.fields)

    @cached_property
    def layout(self) -> Layout:
        """Which fields have ids, and which values."""
        return Layout(
            tuple(field.name for field in self.fields if not field.is_value),
            tuple(field.name for field in self.fields if field.is_value),
        )

    @property
    def inputs(self) -> tuple[FittedField, ...]:
        """The fields that read a column of the rows: all but the crosses."""
        return tuple(field for field in self.fields if not isinstance(field.spec, CrossField))

    def encode(self, rows: Rows) -> pa.Table:
        """Ids (int32, lists of them) and values (float32) of raw rows, one column per field in the pipeline's order.

        The ids of a managed field are int64: hashes, whose rows a map knows (`features.id_maps`).

        The column of a training-only field may be absent: the field's default stands for it.

        Raises:
            InputError: a field's column is missing, or a value cannot be what the field says; names field and row.
        """
        columns, hashes = texts_at_once(rows, self._text_names) if isinstance(rows, Mapping) else ({}, {})
        times = {field.spec.from_ for field in self.inputs if isinstance(field.spec, DateField)}
        rest = {k: v for k, v in rows.items() if k not in columns or k in times} if isinstance(rows, Mapping) else rows
        table = as_table(rest)
        count = len(next(iter(columns.values()))) if columns else table.num_rows
        if columns and table.num_columns and table.num_rows != count:
            raise InputError("rows do not form a table: columns differ in length")
        for field in self.inputs:
            if field.name not in columns:
                assert not isinstance(field.spec, CrossField)  # crosses read no column
                table_of_field = with_default(table, field.spec, count)
                found = canonical(table_of_field, field.spec, field.encoder.kind)
                _require_good(found, field, rows)
                columns[field.name] = found.values
        return self.encode_canonical(columns, hashes)

    @cached_property
    def _text_names(self) -> tuple[str, ...]:
        """The fields with one text value a row that is hashed."""
        return tuple(
            field.name
            for field in self.inputs
            if isinstance(field.spec, CategoricalField) and not isinstance(field.encoder, Identity)
        )

    def encode_canonical(self, columns: Mapping[str, pa.Array], hashes: dict[str, HashN] | None = None) -> pa.Table:
        """The same for columns that are canonical already (see `features.columns`), by the names of the fields.

        `hashes` are those of the text columns whose hashes are known.
        """
        flat = {field.name: flat_values(columns[field.name]) for field in self.inputs}
        hashes = self._hashes({name: values for name, (values, _) in flat.items()}, hashes or {})
        found = self.text_ids(hashes)
        encoded: dict[str, pa.Array] = {}
        ids: dict[str, npt.NDArray[np.integer]] = {}
        for field in self.inputs:
            values, lengths = flat[field.name]
            if isinstance(field.encoder, Scale):
                encoded[field.name] = field.encoder.encode(values)
                continue
            if field.name in found:
                ids[field.name] = with_missing(found[field.name], values)
            else:
                assert not isinstance(field.encoder, _HASHED)  # those are among the hashed
                ids[field.name] = field.encoder.encode(values)
            encoded[field.name] = as_column(ids[field.name], lengths, _width(field))
        for field in self.fields:
            if isinstance(field.spec, CrossField):
                assert isinstance(field.encoder, (Cross, Managed))
                parts = [
                    _part(hashes[name], *flat[name]) if name in hashes else Part.of_ids(ids[name])
                    for name in field.spec.of
                ]
                encoded[field.name] = as_column(*cross_ids(field.encoder, parts), _width(field))
        return pa.table({name: encoded[name] for name in self.names})

    def warm_up(self) -> None:
        """Build now what the first call of `encode` would build."""
        _ = self.lookup, self._vocabulary_number

    @cached_property
    def lookup(self) -> Lookup:
        """All vocabularies."""
        return Lookup([field.encoder for field in self.fields if _owns_vocabulary(field)])  # type: ignore[misc]

    @cached_property
    def _vocabulary_number(self) -> dict[str, int]:
        owners = [field.name for field in self.fields if _owns_vocabulary(field)]
        return {field.name: owners.index(field.owner) for field in self.fields if field.owner in owners}

    @cached_property
    def _hashed(self) -> tuple[str, ...]:
        """The fields whose text is hashed: for their own encoder, or for a cross."""
        crossed = {name for field in self.fields if isinstance(field.spec, CrossField) for name in field.spec.of}
        return tuple(
            field.name
            for field in self.inputs
            if isinstance(field.encoder, _HASHED) or (isinstance(field.encoder, Identity) and field.name in crossed)
        )

    def _hashes(self, flat: dict[str, pa.Array], known: dict[str, HashN]) -> dict[str, HashN]:
        """Hashes of the text fields' values, all fields at once."""
        names = [name for name in self._hashed if name not in known]
        if not names:
            return known
        ends = np.cumsum([len(flat[name]) for name in names])
        together = hash_text(pa.concat_arrays([flat[name] for name in names]))
        return known | dict(zip(names, np.split(together, ends[:-1]), strict=True))

    def text_ids(self, hashes: Mapping[str, HashN]) -> dict[str, npt.NDArray[np.integer]]:
        """Ids of hashed text by field, none of which is missing; of fields with encoders that see hashes."""
        asked = [name for name in hashes if name in self._vocabulary_number]
        found = self.lookup.find([(self._vocabulary_number[name], hashes[name]) for name in asked])
        ids: dict[str, npt.NDArray[np.integer]] = dict(zip(asked, found, strict=True))
        for field in self.inputs:
            if field.name in hashes and isinstance(field.encoder, (Hash, Managed)):
                ids[field.name] = field.encoder.encode(hashes[field.name])
        return ids

    def salts(self, names: Sequence[str]) -> HashN:
        """What `lookup` tells equal values of the fields' vocabularies apart by, [F]; 0 for a field without one."""
        numbers = [self._vocabulary_number.get(name) for name in names]
        return np.array([0 if n is None else self.lookup.salts[n] for n in numbers], np.uint64)

    @cached_property
    def served_defaults(self) -> dict[str, pa.Array]:
        """The encoded default of each training-only field, one row each."""
        defaults = {f.name: d.default for f in self.fields if (d := getattr(f.spec, "training_only", None)) is not None}
        if not defaults:
            return {}
        row = {f.spec.from_ if isinstance(f.spec, DateField) else f.name: [defaults.get(f.name)] for f in self.inputs}
        encoded = self.encode(pa.table({name: pa.array(value) for name, value in row.items()}))
        return {name: encoded[name].combine_chunks() for name in defaults}

    def as_served(self, encoded: pa.Table) -> pa.Table:
        """Encoded rows as serving sees them: training-only fields hold their defaults."""
        for name, one in self.served_defaults.items():
            repeated = one.take(pa.array(np.zeros(encoded.num_rows, np.int64)))
            encoded = encoded.set_column(encoded.column_names.index(name), name, repeated)
        return encoded

    @property
    def hidden(self) -> dict[str, float]:
        """The share of ids that training replaces by the never-seen id, for each field that has one."""
        return {field.name: rate for field in self.fields if (rate := getattr(field.spec, "unknown_rate", 0.0)) > 0}

    @cached_property
    def managed(self) -> dict[str, str]:
        """By each managed field, the field whose table and map of ids it uses, in the order of F."""
        return {field.name: field.owner for field in self.fields if field.is_managed}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides an id or a value."""
        return pipeline_files.digest(self.fields)

    def save(self, folder: Path) -> None:
        """Write pipeline.json and one Parquet file per vocabulary into `folder`, which is made."""
        pipeline_files.save(folder, self.fields, self.digest)

    @classmethod
    def load(cls, folder: Path) -> "FeaturePipeline":
        """Read a saved pipeline.

        Raises:
            InputError: a file is missing or damaged, or the format is newer than this program.
        """
        specs, encoders, stored = pipeline_files.load(folder)
        pipeline = cls.build(specs, encoders)
        if pipeline.digest != stored:
            raise InputError(f"feature pipeline {folder} is damaged: its content does not match its digest")
        return pipeline


def _fitted(spec: FieldSpec, encoders: dict[str, AnyEncoder], by_name: dict[str, FieldSpec]) -> FittedField:
    owner = getattr(spec, "share_with", None) or spec.name
    lists = [by_name[name] for name in (*(spec.of if isinstance(spec, CrossField) else (spec.name,)), owner)]
    pooled = next((part for part in lists[::-1] if isinstance(part, ListField)), None)
    is_list = any(isinstance(part, ListField) for part in lists[:-1])
    return FittedField(spec, encoders[owner], owner, pooled.pooling if pooled else "sum", is_list)


def _part(hash_M: HashN, values: pa.Array, lengths_N: LengthsN | None) -> Part:
    return Part(hash_M, values.is_null().to_numpy(zero_copy_only=False), lengths_N)


def _width(field: FittedField) -> type[np.integer]:
    return np.int64 if field.is_managed else np.int32


def _owns_vocabulary(field: FittedField) -> bool:
    return isinstance(field.encoder, Vocabulary) and field.owner == field.name


def _require_good(column: Canonical, field: FittedField, rows: Rows) -> None:
    if column.bad_N is None:
        return
    row = int(column.bad_N.argmax())
    name = field.spec.from_ if isinstance(field.spec, DateField) else field.name
    (value,) = shown(column_of(as_table(rows), name), np.array([row]))
    raise InputError(f"row {row}, column {name!r}: {value!r} {column.rule}")
