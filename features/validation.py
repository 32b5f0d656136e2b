"""YAML files into validated, frozen objects, with errors a person can act on."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from features.errors import InputError


class Frozen(BaseModel):
    """Base of everything that is configured: immutable, and a key nobody documented is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True)

    def plain(self) -> dict[str, Any]:
        """What differs from the defaults, in the form of the YAML file."""
        return self.model_dump(mode="json", exclude_defaults=True, by_alias=True)


Model = TypeVar("Model", bound=BaseModel)


def load_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML mapping, or say what is wrong with the file."""
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{what} {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise InputError(f"{what} {path} must be a mapping of keys, not {type(data).__name__}")
    return data


def override(data: dict[str, Any], overrides: Iterable[str]) -> None:
    """Apply overrides `key.path=value`, whose values are YAML; InputError names one that is not of this form."""
    for text in overrides:
        key, equals, given = text.partition("=")
        if not equals or not key:
            raise InputError(f"--set {text!r} is not of the form section.key=value")
        try:
            value = yaml.safe_load(given)
        except yaml.YAMLError:
            raise InputError(f"--set {text!r}: the value is not YAML") from None
        set_key(data, key, value, f"--set {text!r}")


def set_key(data: dict[str, Any], path: str, value: Any, source: str) -> None:
    """Set a key like model.blocks in nested sections, made where they are missing; errors begin with `source`."""
    *sections, key = path.split(".")
    for name in sections:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise InputError(f"{source}: {name} is a value, not a section")
    data[key] = value


def validate(model: type[Model], data: Any, source: str) -> Model:
    """Validate `data` as `model`; the error is one line that starts with `source` and names each wrong key."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{source}: {'; '.join(_problem(item) for item in error.errors())}") from None


def _problem(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{place}: unknown key"
    if item["type"] == "missing":
        return f"{place}: required key is missing"
    message = item["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
