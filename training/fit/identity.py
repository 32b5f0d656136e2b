"""What must be the same when a training is resumed: data, start, and what of the configuration decides the result."""

from collections.abc import Iterator
from typing import Any

from features.dataset import PreparedDataset
from features.errors import InputError
from training.config import Config
from training.fit.starting import Start

IDENTITY_FILE = "identity.json"
_FREE = ("checkpoint_steps", "keep_checkpoints", "on_nan", "max_loss")  # keys of `train` that may change


def identity_of(config: Config, data: list[PreparedDataset], start: Start | None) -> dict[str, Any]:
    """Plain values by name, also by the configuration's keys; where tables go, tracking and serving may change."""
    given = config.model_dump(mode="json", exclude={"tracking": True, "sharding": True, "serving": True})
    for key in _FREE:
        given["train"].pop(key)
    return {
        "data": [dataset.digest for dataset in data],
        "--from": None if start is None else start.bundle.digest,
        "--remove-norms": start is not None and start.remove_norms,
        **dict(_flat(given, "")),
    }


def require_same(mine: dict[str, Any], theirs: dict[str, Any], place: str) -> None:
    """InputError that names the first difference between a training and the one in `place`."""
    for key, value in mine.items():
        if theirs.get(key) != value:
            said = "" if key in ("data", "--from") else f" ({theirs.get(key)}, and not {value})"
            raise InputError(f"{place} is of another training, with another {key}{said}: choose another --out")


def _flat(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
