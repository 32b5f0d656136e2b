"""What a schema says of each field: the column it reads and what becomes of its values. See features/README.md."""

from typing import Annotated, Literal, TypeAlias

import polars as pl
from pydantic import Field, field_validator, model_validator

from features.validation import Frozen

FieldName = Annotated[str, Field(min_length=1)]
Buckets = Annotated[int, Field(ge=1, le=2**31 - 3)]  # two ids are kept for missing and never seen
VALUE_ENCODERS = ("standard", "log1p", "minmax")
Eviction = Literal["lfu", "lru", "distance_lfu"]
MANAGED_BUCKETS = 3  # at least: missing, never seen, and an id
DATE_PARTS = {"hour": 24, "weekday": 7, "day": 31, "month": 12}
MAX_PARTS = 8  # of a cross
_LOG_BUCKETS = 512


class TrainingOnly(Frozen):
    """A field that training reads and serving does not know, such as the position of an impression."""

    default: str | int | float


class _Ids(Frozen):
    """Keys shared by fields whose values are looked up (vocabulary), hashed (hash), ids already (identity) or given
    rows while training goes on (managed)."""

    name: FieldName
    encoder: Literal["vocabulary", "hash", "identity", "managed"] = "vocabulary"
    min_count: Annotated[int, Field(ge=1)] | None = None
    max_size: Annotated[int, Field(ge=1)] | None = None
    buckets: Buckets | None = None
    eviction: Eviction | None = None
    unknown_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    share_with: FieldName | None = None
    training_only: TrainingOnly | None = None

    @model_validator(mode="after")
    def _encoder_keys(self) -> "_Ids":
        given = self.model_fields_set
        if self.share_with is not None:
            _refuse(
                given,
                ("encoder", "min_count", "max_size", "buckets", "eviction"),
                "share_with takes it from the other field",
            )
        elif self.encoder == "vocabulary":
            _refuse(given, ("buckets",), "it belongs to encoder hash, identity and managed, not to vocabulary")
        else:
            _refuse(given, ("min_count", "max_size"), f"it belongs to encoder vocabulary, not to {self.encoder}")
            if self.buckets is None:
                raise ValueError(f"encoder {self.encoder} needs buckets, the number of ids")
        if self.share_with is None:
            _check_managed(self.encoder, self.buckets, self.eviction)
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
    keep: Literal["first", "last"] = "first"

    @model_validator(mode="after")
    def _pooling_is_shared(self) -> "ListField":
        if self.share_with is not None:
            _refuse(self.model_fields_set, ("pooling",), "share_with takes it from the other field")
        return self


class NumericField(Frozen):
    """A number: cut into buckets (quantile, log_bucket) or kept as a value (standard, log1p, minmax)."""

    name: FieldName
    type: Literal["numeric"]
    encoder: Literal["quantile", "log_bucket", "standard", "log1p", "minmax"] = "quantile"
    buckets: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    normalize: bool | None = None
    training_only: TrainingOnly | None = None

    @model_validator(mode="after")
    def _encoder_keys(self) -> "NumericField":
        if self.is_value and self.buckets is not None:
            raise ValueError(f"buckets: it belongs to encoder quantile and log_bucket, not to {self.encoder}")
        if not self.is_value and self.normalize is not None:
            raise ValueError(f"normalize: it belongs to {', '.join(VALUE_ENCODERS)}, whose values are not looked up")
        return self

    @property
    def is_value(self) -> bool:
        """Whether the encoder gives values and not ids."""
        return self.encoder in VALUE_ENCODERS

    @property
    def num_buckets(self) -> int:
        return self.buckets or (_LOG_BUCKETS if self.encoder == "log_bucket" else 32)


class CrossField(Frozen):
    """The combination of other fields' values as one value, hashed or managed."""

    name: FieldName
    type: Literal["cross"]
    of: Annotated[tuple[FieldName, ...], Field(min_length=2, max_length=MAX_PARTS)]
    encoder: Literal["hash", "managed"] = "hash"
    buckets: Buckets
    eviction: Eviction | None = None

    @model_validator(mode="after")
    def _encoder_keys(self) -> "CrossField":
        _check_managed(self.encoder, self.buckets, self.eviction)
        return self


class DateField(Frozen):
    """A part of a time as a class: hour 0–23, weekday 0–6 (0 is Monday), day 1–31, month 1–12."""

    name: FieldName
    type: Literal["date"]
    from_: FieldName = Field(alias="from")
    part: Literal["hour", "weekday", "day", "month"]
    format: str | None = None
    timezone: str = "UTC"

    @field_validator("timezone")
    @classmethod
    def _is_zone(cls, value: str) -> str:
        try:
            pl.Series([0]).cast(pl.Datetime("us", "UTC")).dt.convert_time_zone(value)
        except pl.exceptions.PolarsError:
            raise ValueError(f"{value!r} is no time zone, such as Europe/Berlin") from None
        return value


RawField: TypeAlias = CategoricalField | ListField | NumericField
DerivedField: TypeAlias = CrossField | DateField
FieldSpec: TypeAlias = Annotated[RawField | DerivedField, Field(discriminator="type")]


def _check_managed(encoder: str, buckets: int | None, eviction: str | None) -> None:
    if encoder != "managed" and eviction is not None:
        raise ValueError(f"eviction: it belongs to encoder managed, not to {encoder}")
    if encoder == "managed" and buckets is not None and buckets < MANAGED_BUCKETS:
        raise ValueError(
            f"buckets: {buckets} rows are too few for encoder managed: missing, never seen and an id need one each"
        )


def _refuse(given: set[str], keys: tuple[str, ...], why: str) -> None:
    for key in keys:
        if key in given:
            raise ValueError(f"{key}: {why}")
