"""The configuration reference, from the fields' own descriptions: `python -m training.reference` prints it."""

import sys
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from training.config import Config


def config_reference() -> str:
    """A Markdown table with a row per key: default and meaning."""
    rows = [f"| `{key}` | {default} | {meaning} |" for key, default, meaning in _rows(Config, "")]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])


def _rows(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and field.description is None:
            yield from _rows(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _default(field.default), str(field.description)


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        inner = ", ".join(f"{key}: {item}" for key, item in value.model_dump().items())
        return f"`{{{inner}}}`"
    if value is None:
        return "–"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    sys.stdout.write(config_reference() + "\n")
