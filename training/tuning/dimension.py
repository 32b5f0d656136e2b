"""One key that is searched: its values as space.yaml has them, and how Optuna stores them."""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from features.validation import Frozen

ABSENT = object()
Plain = dict[str, Any]


class Range(Frozen):
    """The values of one key, as the file has them."""

    choices: list[Any] | None = Field(default=None, min_length=1)
    low: int | float | None = None
    high: int | float | None = None
    step: int | float | None = Field(default=None, gt=0)
    log: bool = False
    when: dict[str, Any] = Field(default={})
    otherwise: Any = None

    @model_validator(mode="after")
    def _is_one_kind(self) -> "Range":
        ends = (self.low, self.high)
        if self.choices is not None:
            if ends != (None, None) or self.step is not None or self.log:
                raise ValueError("choices stand alone, without low, high, step and log")
            if len({label(choice) for choice in self.choices}) < len(self.choices):
                raise ValueError("a choice is there twice")
            if not all(isinstance(choice, str | int | float | list | dict | None) for choice in self.choices):
                raise ValueError("a choice is a text, a number, true, false, null, a list or a mapping")
        elif self.low is None or self.high is None:
            raise ValueError("there must be choices, or low and high")
        else:
            self._check_ends(self.low, self.high)
        if "otherwise" in self.model_fields_set and not self.when:
            raise ValueError("otherwise needs a when")
        return self

    def _check_ends(self, low: float, high: float) -> None:
        if not low < high < float("inf"):
            raise ValueError(f"low {low} must be below high {high}")
        if self.log and low <= 0:
            raise ValueError(f"log needs a low above 0, not {low}")
        if self.log and self.step is not None:
            raise ValueError("log and step do not go together")
        if self.step is not None and abs((steps := (high - low) / self.step) - round(steps)) > 1e-9:
            raise ValueError(f"from low {low} to high {high} is no whole number of steps of {self.step}")

    @property
    def is_whole(self) -> bool:
        """Whether values are whole numbers."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 1))


def label(choice: Any) -> str | float | int | bool | None:
    """A choice as Optuna stores it, which knows no lists and mappings."""
    return json.dumps(choice) if isinstance(choice, list | dict) else choice


@dataclass(frozen=True)
class Dimension:
    """A key that is searched; of choices also the form that a configuration gives them; what is configured."""

    key: str
    range: Range
    forms: tuple[Any, ...] = ()
    own: Any = ABSENT

    def applies(self, data: Plain) -> bool:
        """Whether the key is searched, where others have these values."""
        wanted = {key: value if isinstance(value, list) else [value] for key, value in self.range.when.items()}
        return all(value_of(data, key) in values for key, values in wanted.items())

    def suggest(self, trial: Any) -> Any:
        """Optuna's choice, as a configuration takes it; numbers to four digits, but for the configured one."""
        given = self.range
        if given.choices is not None:
            labels = [label(choice) for choice in given.choices]
            return given.choices[labels.index(trial.suggest_categorical(self.key, labels))]
        if given.is_whole:
            return trial.suggest_int(self.key, given.low, given.high, step=given.step or 1, log=given.log)
        value = trial.suggest_float(self.key, given.low, given.high, step=given.step, log=given.log)
        return value if value == self.own else float(f"{value:.4g}")

    def nearest(self) -> Any:
        """What Optuna stores for the value of the range that is nearest to the configured one, which is a choice."""
        given = self.range
        if given.choices is not None:
            return label(given.choices[self.forms.index(self.own) if self.own in self.forms else 0])
        assert given.low is not None
        assert given.high is not None
        number = min(max(self.own, given.low), given.high) if isinstance(self.own, int | float) else given.low
        if given.step is not None:
            number = given.low + round((number - given.low) / given.step) * given.step
        return round(number) if given.is_whole else float(number)


def value_of(data: Plain, path: str) -> Any:
    """The value at a key like model.blocks in nested sections, or ABSENT."""
    value: Any = data
    for name in path.split("."):
        value = value.get(name, ABSENT) if isinstance(value, dict) else ABSENT
    return value
