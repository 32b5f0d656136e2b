"""The schema: which columns a click log has and how each becomes a feature."""

import operator
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from features.validation import Frozen, load_yaml, validate

_COMPARISONS: dict[str, Callable[[Any, float], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_POSITIVE = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*(-?\d+(?:\.\d+)?)\s*")


FieldName = Annotated[str, Field(min_length=1)]


class Label(Frozen):
    """The column that says whether a row is a click: 0 or 1, or any number with a comparison in `positive`."""

    column: str
    positive: str | None = None

    @field_validator("positive")
    @classmethod
    def _is_comparison(cls, value: str | None) -> str | None:
        if value is not None and not _POSITIVE.fullmatch(value):
            raise ValueError(f"{value!r} is not a comparison with a number, such as '>= 4'")
        return value

    @cached_property
    def comparison(self) -> tuple[Callable[[Any, float], Any], float] | None:
        """The comparison and its right-hand side, or None where the column itself is 0 or 1."""
        found = _POSITIVE.fullmatch(self.positive) if self.positive else None
        return (_COMPARISONS[found[1]], float(found[2])) if found else None


class Csv(Frozen):
    """How delimited text is laid out; `columns` names the columns of files without a header."""

    separator: Annotated[str, Field(min_length=1, max_length=1)] = ","
    header: bool = True
    columns: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_columns(self) -> "Csv":
        if self.header == bool(self.columns):
            raise ValueError("columns must name the columns when header is false, and be left out when it is true")
        return self


class _Ids(Frozen):
    """Keys shared by fields whose values are looked up (vocabulary) or hashed (hash)."""

    name: FieldName
    encoder: Literal["vocabulary", "hash"] = "vocabulary"
    min_count: Annotated[int, Field(ge=1)] | None = None
    buckets: Annotated[int, Field(ge=1)] | None = None
    unknown_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    @model_validator(mode="after")
    def _encoder_keys(self) -> "_Ids":
        if self.encoder == "hash":
            if self.buckets is None:
                raise ValueError("encoder hash needs buckets, the number of ids to hash into")
            if self.min_count is not None:
                raise ValueError("min_count belongs to encoder vocabulary, not to hash")
        elif self.buckets is not None:
            raise ValueError("buckets belongs to encoder hash, not to vocabulary")
        return self


class CategoricalField(_Ids):
    """One value a row: an id of something, or a class."""

    type: Literal["categorical"]


class ListField(_Ids):
    """Several values a row, from a Parquet list column or from text split at `separator`; embeddings are pooled."""

    type: Literal["list"]
    separator: Annotated[str, Field(min_length=1)] | None = None
    pooling: Literal["mean", "sum"] = "mean"
    max_length: Annotated[int, Field(ge=1)] = 50


class NumericField(Frozen):
    """A number, cut into equally filled buckets fitted on the training split."""

    name: FieldName
    type: Literal["numeric"]
    encoder: Literal["quantile"] = "quantile"
    buckets: Annotated[int, Field(ge=2)] = 32


FieldSpec = Annotated[CategoricalField | ListField | NumericField, Field(discriminator="type")]


class Schema(Frozen):
    """A whole schema file. See features/README.md for every key."""

    name: Annotated[str, Field(min_length=1)]
    label: Label
    fields: Annotated[tuple[FieldSpec, ...], Field(min_length=1)]
    time: str | None = None
    group: str | None = None
    weight: str | None = None
    context: tuple[str, ...] = ()
    csv: Csv = Csv()

    @model_validator(mode="after")
    def _names_agree(self) -> "Schema":
        names = [field.name for field in self.fields]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"fields: {twice[0]!r} is defined twice")
        reserved = [name for name in names if name.startswith("_")]
        if reserved:
            raise ValueError(f"fields: {reserved[0]!r} starts with an underscore, which is kept for the data set")
        if len(set(self.context)) < len(self.context):
            raise ValueError("context names a field twice")
        strangers = [name for name in self.context if name not in names]
        if strangers:
            raise ValueError(f"context: {strangers[0]!r} is not a field; the fields are {', '.join(names)}")
        if self.label.column in names:
            raise ValueError(f"label: {self.label.column!r} is also a field, so the model would see the answer")
        return self

    @property
    def candidate_fields(self) -> tuple[str, ...]:
        """Names of the fields that a ranking request sends per candidate."""
        return tuple(field.name for field in self.fields if field.name not in self.context)

    @property
    def raw_columns(self) -> tuple[str, ...]:
        """Columns that raw rows must have, each once: the fields, then label, time, group and weight."""
        others = (self.label.column, self.time, self.group, self.weight)
        return tuple(dict.fromkeys([*(field.name for field in self.fields), *(name for name in others if name)]))


def load_schema(path: Path) -> Schema:
    """Read and validate a schema file; InputError names the file and the key."""
    return validate(Schema, load_yaml(path, "schema"), f"schema {path}")
