"""What a challenger must show before it gets an alias: a YAML file, every key described here."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from features.validation import Frozen, load_yaml, validate

Kind = Literal["missing", "unknown", "cold", "warm", "head"]


class SliceRule(Frozen):
    """A part of the rows in which the challenger's log loss may exceed the champion's by so much and no more."""

    field: str = Field(min_length=1, description="a field of the challenger's schema")
    value: str | int | float | None = Field(
        default=None, description="the rows with this raw value; of a bucketed number, those of its bucket"
    )
    is_: Kind | None = Field(
        default=None,
        alias="is",
        description="missing: without a value; unknown: with one that the challenger does not know; cold, warm, head: "
        "by how often training has seen it, which needs --data",
    )
    max_logloss_increase: float = Field(default=0.01, ge=0, description="largest rise of log loss, in nats")

    @model_validator(mode="after")
    def _says_which(self) -> "SliceRule":
        if (self.value is None) == (self.is_ is None):
            raise ValueError("give either value or is")
        return self

    @property
    def name(self) -> str:
        """As a person reads it: "gender = F", "user_id is cold"."""
        return f"{self.field} = {self.value}" if self.is_ is None else f"{self.field} is {self.is_}"


class PromotionConfig(Frozen):
    """The gate of `masknet promote`."""

    level: float = Field(
        default=0.05, gt=0, lt=1, description="p below which a worse log loss or AUC is no chance, and refused"
    )
    max_calibration_error: float = Field(
        default=0.1,
        ge=0,
        description="largest |predicted / observed clicks − 1|; where chance explains more, "
        "that, up to three times as much",
    )
    max_ece: float = Field(
        default=0.05,
        ge=0,
        description="largest expected calibration error; where chance explains more, that, up to three times as much",
    )
    min_rows: int = Field(default=100, ge=2, description="fewer rows judge no model")
    slices: tuple[SliceRule, ...] = Field(default=(), description="parts of the rows that must not get worse")
    min_slice_rows: int = Field(default=100, ge=1, description="a slice with fewer rows judges nothing")
    replicates: int = Field(default=1000, ge=100, description="draws of the bootstrap behind intervals and p")

    @model_validator(mode="after")
    def _can_refuse(self) -> "PromotionConfig":
        if 2 / (self.replicates + 1) >= self.level:
            raise ValueError(
                f"level {self.level:g} needs more replicates: the least p of {self.replicates} is above it"
            )
        return self


def load_promotion_config(path: Path | None) -> PromotionConfig:
    """Read the gate's configuration; without a file, the defaults.

    Raises:
        InputError: the file, a key or a value is wrong; the message names it.
    """
    if path is None:
        return PromotionConfig()
    return validate(PromotionConfig, load_yaml(path, "promotion config"), f"promotion config {path}")
