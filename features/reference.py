"""The reference of a configuration, from its fields' own descriptions."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined


def reference(model: type[BaseModel]) -> str:
    """A Markdown table with a row per key: default and meaning. Of a section that may be left out, keys are required
    where it is there."""
    rows = [f"| `{key}` | {default} | {meaning} |" for key, default, meaning in _rows(model, "")]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])


def _rows(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is not None and field.description is None:
            yield from _rows(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _default(field.default), str(field.description)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model that a key holds, alone or where null may stand for it."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        inner = ", ".join(f"{key}: {item}" for key, item in value.model_dump().items())
        return f"`{{{inner}}}`"
    if value is None:
        return "–"
    if value == "":
        return '`""`'
    return f"`{list(value) if isinstance(value, tuple) else value}`"
