"""What `masknet tune` searches: keys of the configuration, their values, and when they matter. Format: space.yaml."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from features.errors import InputError
from features.validation import load_yaml, set_key, validate
from training.config import Config
from training.tracking.opening import flat
from training.tuning.dimension import ABSENT, Dimension, Plain, Range, label, value_of

DEFAULT = Path(__file__).with_name("space.yaml")
_SEARCHED = ("model.", "optimizer.", "schedule.", "train.")
_GIVEN = {
    "train.seed": "a trial's luck is not to be searched",
    "train.early_stop.metric": "that is --metric",
    "train.train_only_affine": "trials start from no model",
    "train.members": "a trial is one model; --ensemble makes one of several",
}


@dataclass(frozen=True)
class Space:
    """Keys to search in their order, over a configuration that has all others."""

    source: str
    base: Config
    dimensions: tuple[Dimension, ...]

    @classmethod
    def load(cls, path: Path | None, base: Config, fixed: list[str]) -> "Space":
        """Read a file, or the default; `fixed` keys are left out.

        Raises:
            InputError: a key is unknown or not to be searched, a value is none of the key's, nothing is left, or
                the first trial's values do not go together.
        """
        source = f"space {path or DEFAULT}"
        data = base.model_dump(mode="json")
        found = load_yaml(path or DEFAULT, "space")
        ranges = {key: validate(Range, given, f"{source}: {key}") for key, given in found.items()}
        for index, (key, given) in enumerate(ranges.items()):
            _require_searched(source, key, data, [*ranges][index + 1 :], given)
        kept = {key: given for key, given in ranges.items() if not any(_overlap(key, other) for other in fixed)}
        if not kept:
            raise InputError(f"{source}: nothing is left to search")
        space = cls(source, base, tuple(_dimension(source, key, given, data) for key, given in kept.items()))
        space.configured()
        return space

    def configure(self, choose: Callable[[Dimension], Any]) -> Config:
        """The configuration with every key that applies as `choose` says.

        Raises:
            InputError: the values do not go together.
        """
        data = self.base.model_dump(mode="json")
        for dimension in self.dimensions:
            if dimension.applies(data):
                set_key(data, dimension.key, choose(dimension), self.source)
            elif "otherwise" in dimension.range.model_fields_set:
                set_key(data, dimension.key, dimension.range.otherwise, self.source)
        return validate(Config, data, self.source)

    def suggest(self, trial: Any) -> Config:
        """The configuration of an Optuna trial; of one that has its parameters, the same again."""
        return self.configure(lambda dimension: dimension.suggest(trial))

    def of(self, parameters: Plain) -> Config:
        """The configuration of a trial's stored parameters."""
        return self.suggest(_Stored(parameters))

    def configured(self) -> Plain:
        """Optuna's parameters of the base configuration, or of the nearest in the space.

        Raises:
            InputError: that one is refused, so that the space does not go with the configuration.
        """
        found: Plain = {}

        def choose(dimension: Dimension) -> Any:
            found[dimension.key] = dimension.nearest()
            return dimension.suggest(_Stored(found))

        self.configure(choose)  # or it raises
        return found

    def changed(self) -> dict[str, Plain]:
        """Keys of which the first trial has not what is configured, as the space does not hold it: both values."""
        given, first = (flat(config.model_dump(mode="json")) for config in (self.base, self.of(self.configured())))
        return {
            key: {"configured": given.get(key), "first": first.get(key)}
            for key in given | first
            if given.get(key) != first.get(key)
        }

    def plain(self) -> Plain:
        """The space as JSON has it."""
        return {dimension.key: dimension.range.plain() for dimension in self.dimensions}


@dataclass(frozen=True)
class _Stored:
    """Stands for an Optuna trial whose parameters are known."""

    parameters: Plain

    def suggest_categorical(self, key: str, *_: Any, **__: Any) -> Any:
        return self.parameters[key]

    suggest_int = suggest_float = suggest_categorical


def _require_searched(source: str, key: str, data: Plain, later: list[str], given: Range) -> None:
    """InputError for a key that is not to be searched, or a `when` of one that is unknown or has no value yet."""
    if value_of(data, key) is ABSENT:
        raise InputError(f"{source}: {key}: unknown key")
    if key in _GIVEN:
        raise InputError(f"{source}: {key}: {_GIVEN[key]}")
    if not key.startswith(_SEARCHED):
        raise InputError(f"{source}: {key}: only keys of model, optimizer, schedule and train are searched")
    for other in later:
        if _overlap(key, other):
            raise InputError(f"{source}: {key} and {other}: one is part of the other")
    for other in given.when:
        if value_of(data, other) is ABSENT:
            raise InputError(f"{source}: {key}: when: {other}: unknown key")
        if other in later or other == key:
            raise InputError(f"{source}: {key}: when: {other} must stand further up")


def _dimension(source: str, key: str, given: Range, data: Plain) -> Dimension:
    """The dimension, each of whose values the key takes; what depends on other keys is seen when all have values.

    What is configured is a choice, too, where the key applies.
    """
    values = given.choices if given.choices is not None else [given.low, given.high]
    forms = tuple(_form(source, key, value, data) for value in values)
    if given.choices is None and not given.is_whole and all(isinstance(form, int) for form in forms):
        raise InputError(f"{source}: {key}: it takes whole numbers, so that low, high and step must be whole")
    found = Dimension(key, given, forms, own := value_of(data, key))
    if given.choices is None or own in forms or not found.applies(data):
        return found
    return Dimension(key, given.model_copy(update={"choices": [*given.choices, own]}), (*forms, own), own)


def _form(source: str, key: str, value: Any, data: Plain) -> Any:
    changed = json.loads(json.dumps(data))
    set_key(changed, key, value, source)
    try:
        return value_of(Config.model_validate(changed).model_dump(mode="json"), key)
    except ValidationError as error:
        path = tuple(key.split("."))
        for problem in error.errors():
            if tuple(str(part) for part in problem["loc"][: len(path)]) == path:
                message = problem["msg"].removeprefix("Value error, ")
                raise InputError(f"{source}: {key}: {label(value)}: {message}") from None
        return value


def _overlap(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")
