"""The schema: which columns a click log has and how each becomes a feature."""

import operator
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from features.fields import CrossField, DateField, FieldSpec, ListField, NumericField, RawField
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


class Time(Frozen):
    """The column with a row's time, and how it is written (in strftime's codes) where not in seconds or as ISO 8601."""

    column: str
    format: str | None = None


class Csv(Frozen):
    """How delimited text is laid out; `columns` names the columns of files without a header; `quote: null` is none."""

    separator: Annotated[str, Field(min_length=1, max_length=1)] = ","
    header: bool = True
    columns: tuple[str, ...] = ()
    quote: Literal['"', "'"] | None = '"'

    @model_validator(mode="after")
    def _names_columns(self) -> "Csv":
        if self.header == bool(self.columns):
            raise ValueError("columns must name the columns when header is false, and be left out when it is true")
        if not self.separator.isascii() or self.separator in "\r\n" or self.separator == self.quote:
            raise ValueError(f"separator {self.separator!r} cannot separate columns")
        return self


class Sampling(Frozen):
    """The share of negatives that is kept; scores are corrected for it."""

    rate: Annotated[float, Field(gt=0.0, le=1.0)]


class Schema(Frozen):
    """A whole schema file. See features/README.md for every key."""

    name: Annotated[str, Field(min_length=1)]
    label: Label
    fields: Annotated[tuple[FieldSpec, ...], Field(min_length=1)]
    time: Time | None = None
    group: str | None = None
    weight: str | None = None
    context: tuple[str, ...] = ()
    csv: Csv = Csv()
    negative_sampling: Sampling | None = None
    already_sampled: Sampling | None = None

    @field_validator("time", mode="before")
    @classmethod
    def _column_alone(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _names_agree(self) -> "Schema":
        names = [field.name for field in self.fields]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"fields: {twice[0]!r} is defined twice")
        reserved = [name for name in names if name.startswith("_")]
        if reserved:
            raise ValueError(f"fields: {reserved[0]!r} starts with an underscore, which is kept for the data set")
        if self.label.column in [*names, *self.date_columns]:
            raise ValueError(f"label: {self.label.column!r} is also a field, so the model would see the answer")
        by_name = {field.name: field for field in self.fields}
        for field in self.fields:
            _check_references(field, by_name)
            _check_default(field, self.encoder_of(field))
        if all(isinstance(field, NumericField) and field.is_value for field in self.fields):
            raise ValueError("fields: every field is a value; at least one must have ids")
        self._check_context(names)
        return self

    def _check_context(self, names: list[str]) -> None:
        if len(set(self.context)) < len(self.context):
            raise ValueError("context names a field twice")
        strangers = [name for name in self.context if name not in names]
        if strangers:
            raise ValueError(f"context: {strangers[0]!r} is not a field; the fields are {', '.join(names)}")
        for field in self.fields:
            if field.name in self.context and (isinstance(field, (CrossField, DateField)) or field.training_only):
                raise ValueError(f"context: {field.name!r} is not sent by clients: leave it out")

    def encoder_of(self, field: FieldSpec) -> str:
        """The kind of encoder that reads a field: its own, or that of the field it shares with; a date has none."""
        owner = getattr(field, "share_with", None) or field.name
        return next((getattr(other, "encoder", "") for other in self.fields if other.name == owner), "")

    @property
    def served_fields(self) -> tuple[RawField, ...]:
        """The fields that a client sends: all but the derived and the training-only ones."""
        return tuple(
            field for field in self.fields if not isinstance(field, (CrossField, DateField)) and not field.training_only
        )

    @property
    def training_only(self) -> tuple[str, ...]:
        """Names of the fields that serving does not know."""
        return tuple(field.name for field in self.fields if getattr(field, "training_only", None))

    @property
    def candidate_fields(self) -> tuple[str, ...]:
        """Names of the fields that a ranking request sends per candidate."""
        return tuple(field.name for field in self.served_fields if field.name not in self.context)

    @property
    def date_columns(self) -> tuple[str, ...]:
        """The columns that date fields read, each once."""
        return tuple(dict.fromkeys(field.from_ for field in self.fields if isinstance(field, DateField)))

    @property
    def raw_columns(self) -> tuple[str, ...]:
        """Columns that raw rows must have, each once: the fields' inputs, then label, time, group and weight."""
        inputs = [field.name for field in self.fields if not isinstance(field, (CrossField, DateField))]
        others = (self.label.column, self.time.column if self.time else None, self.group, self.weight)
        return tuple(dict.fromkeys([*inputs, *self.date_columns, *(name for name in others if name)]))

    @property
    def sampling_rate(self) -> float:
        """Kept share of negatives in the training split, over both ways of dropping them."""
        given = (self.negative_sampling, self.already_sampled)
        rate = 1.0
        for sampling in given:
            rate *= sampling.rate if sampling else 1.0
        return rate

    def missing_negatives(self, split: str) -> str | None:
        """Why a split lacks negatives that scores are corrected for; None where all are there.

        `negative_sampling` drops those of the training split alone, `already_sampled` speaks of all rows.
        """
        arrived, dropped = self.already_sampled, self.negative_sampling
        if arrived is not None and arrived.rate < 1:
            return f"negatives arrived at a share of {arrived.rate:g} (already_sampled)"
        if split == "train" and dropped is not None and dropped.rate < 1:
            return f"the train split keeps a share of {dropped.rate:g} of its negatives (negative_sampling)"
        return None


def _check_references(field: FieldSpec, fields: dict[str, FieldSpec]) -> None:
    """ValueError where a field refers to one that is not there or cannot be used so."""
    if isinstance(field, CrossField):
        lists = 0
        for name in field.of:
            part = fields.get(name)
            if part is None or isinstance(part, CrossField) or (isinstance(part, NumericField) and part.is_value):
                raise ValueError(f"fields: {field.name!r} crosses {name!r}, which is no field with ids of its own")
            if getattr(part, "training_only", None):
                raise ValueError(f"fields: {field.name!r} crosses {name!r}, which serving does not know")
            lists += isinstance(part, ListField)
        if lists > 1:
            raise ValueError(f"fields: {field.name!r} crosses several lists; one at most can be crossed")
    elif isinstance(field, DateField):
        source = fields.get(field.from_)
        if source is not None and getattr(source, "training_only", None):
            raise ValueError(f"fields: {field.name!r} is a part of {field.from_!r}, which serving does not know")
    elif not isinstance(field, NumericField) and field.share_with is not None:
        other = fields.get(field.share_with)
        if other is None or isinstance(other, (NumericField, DateField, CrossField)) or other.share_with is not None:
            raise ValueError(
                f"fields: {field.name!r} shares with {field.share_with!r}, which is no categorical or list field with "
                "an encoder of its own"
            )


def _check_default(field: FieldSpec, encoder: str) -> None:
    """ValueError where the default of a training-only field is no value of the field."""
    training_only = getattr(field, "training_only", None)
    if training_only is None:
        return
    value = training_only.default
    fits = not isinstance(value, str) if isinstance(field, NumericField) else True
    if encoder == "identity":
        fits = str(value).isdecimal()
    elif isinstance(field, ListField):
        fits = isinstance(value, str)
    if not fits:
        raise ValueError(f"fields: {field.name!r}: training_only.default {value!r} is no value of the field")


def load_schema(path: Path) -> Schema:
    """Read and validate a schema file; InputError names the file and the key."""
    return validate(Schema, load_yaml(path, "schema"), f"schema {path}")
