"""Cells: the variants of a configuration that an ablation compares.

A norm is written NAME or NAME(key=value, …); a pair EMBEDDING/HIDDEN takes one norm for each slot, and +ACTIVATION
behind it another non-linearity: layer, none/layer, power(group_scaling=4), none+selu. A name alone has the norm's own
defaults, whatever the configuration says of its norms; `config` stands for the configuration as it is.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml

from features.errors import InputError
from features.validation import set_key, validate
from training.config import Config

AS_CONFIGURED = "config"
FACTOR = 3.0  # between learning rates
T = TypeVar("T", int, float)
_VARIED = ("model.", "optimizer.", "train.")
_COMMON = ("train.seed", "train.train_only_affine")
_NORM = re.compile(r"(?P<name>[a-z0-9_]+)(?:\((?P<parameters>[^()]*)\))?")
_OUTSIDE_BRACKETS = r"(?![^()]*\))"
WITHOUT: dict[str, dict[str, Any]] = {
    "mask": {"mask": False},
    "norm": {"embedding_norm": "none", "hidden_norm": "none"},
    "feed-forward": {"feed_forward": False, "hidden_norm": "none"},
}


@dataclass(frozen=True)
class Cell:
    """A variant by its name, and how it differs: `family` says in which table of a report it belongs."""

    name: str
    config: Config
    family: str = "normalization"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What to compare, as the command line says it."""

    norms: tuple[str, ...]
    placements: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    embedding_dims: tuple[int, ...] = ()
    ratios: tuple[float, ...] = ()
    vary: tuple[str, ...] = ()

    def cells(self, config: Config, baseline: str) -> list[Cell]:
        """All cells, each once; those that are no norms start from the `baseline` cell.

        Raises:
            InputError: a cell's configuration is refused, or the baseline is no cell of a norm or a placement.
        """
        cells = [Cell(norm, _with(config, _norms(norm), norm)) for norm in self.norms] + self._placed(config)
        base = next((cell.config for cell in cells if cell.name == baseline), None)
        if base is None:
            raise InputError(f"--baseline {baseline} is no cell; there are {', '.join(cell.name for cell in cells)}")
        cells += self._without(base)
        for key, values in self._varied():
            cells += [
                Cell(f"{key}={value}", _with(base, {key: value}, f"{key}={value}"), key)
                for value in values
                if _value_of(base, key) != value
            ]
        return list({cell.name: cell for cell in cells}.values())

    def _placed(self, config: Config) -> list[Cell]:
        """Every norm in every placement of a residual network; placement none leaves it at LN_EMB alone."""
        cells = []
        for placement in self.placements:
            for norm in self.norms:
                changes = {**_norms(norm), "model.kind": "residual_serial", "model.head": []}
                changes["model.placement"] = placement
                if placement == "none":
                    changes["model.hidden_norm"] = "none"
                name = f"{norm} {placement}"
                cells.append(Cell(name, _with(config, changes, name), "placement"))
        return cells

    def _without(self, base: Config) -> list[Cell]:
        unknown = [part for part in self.without if part not in WITHOUT]
        if unknown:
            raise InputError(f"--without {unknown[0]} is none of {', '.join(WITHOUT)}")
        changes = {part: {f"model.{key}": value for key, value in WITHOUT[part].items()} for part in self.without}
        return [Cell(f"no {part}", _with(base, changes[part], f"no {part}"), "without") for part in self.without]

    def _varied(self) -> list[tuple[str, list[Any]]]:
        paper = {
            "model.blocks": self.blocks,
            "model.embedding_dim": self.embedding_dims,
            "model.reduction_ratio": self.ratios,
        }
        varied = [(key, list(values)) for key, values in paper.items()]
        for text in self.vary:
            key, equals, values = text.partition("=")
            if not equals or not key:
                raise InputError(f"--vary {text!r} is not of the form section.key=value,value")
            if not key.startswith(_VARIED):
                raise InputError(f"--vary {key}: only keys of model, optimizer and train differ between cells")
            if key in _COMMON:
                raise InputError(f"--vary {key}: it is the same for all cells")
            varied.append((key, _yaml(f"[{values}]", f"--vary {text!r}")))
        return varied


def split_norms(text: str) -> tuple[str, ...]:
    """The norms of a comma-separated list; commas in brackets separate parameters."""
    return tuple(part.strip() for part in re.split(f",{_OUTSIDE_BRACKETS}", text) if part.strip())


def numbers(option: str, text: str, kind: type[T]) -> tuple[T, ...]:
    """The numbers of a comma-separated list; InputError names the option."""
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"{option} {text!r} is no list of numbers") from None


def _norms(text: str) -> dict[str, Any]:
    """A norm's text as changes of the configuration."""
    if text == AS_CONFIGURED:
        return {}
    norms, _, activation = text.partition("+")
    slots = re.split(f"/{_OUTSIDE_BRACKETS}", norms)
    if len(slots) > 2:
        raise InputError(f"norm {text!r} has more than two slots: write EMBEDDING/HIDDEN")
    changes: dict[str, Any] = {
        "model.embedding_norm": _slot(slots[0], text),
        "model.hidden_norm": _slot(slots[-1], text),
    }
    return {**changes, "model.activation": activation} if activation else changes


def _slot(text: str, whole: str) -> dict[str, Any]:
    match = _NORM.fullmatch(text.strip())
    if match is None:
        raise InputError(
            f"norm {whole!r} is not of the form NAME, NAME(key=value), EMBEDDING/HIDDEN or NAME+ACTIVATION"
        )
    pairs = [pair.partition("=") for pair in (match["parameters"] or "").split(",") if pair.strip()]
    parameters = {key.strip(): _yaml(value, f"norm {whole!r}") for key, _, value in pairs}
    if "name" in parameters:
        raise InputError(f"norm {whole!r}: name is no parameter")
    return {"name": match["name"], **parameters}


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"{source}: {text!r} is not YAML") from None


def _with(config: Config, changes: dict[str, Any], cell: str) -> Config:
    """The configuration with keys like model.blocks set; the error names the cell."""
    data = config.model_dump(mode="json")
    for path, value in changes.items():
        set_key(data, path, value, f"cell {cell}")
    return validate(Config, data, f"cell {cell}")


def _value_of(config: Config, path: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def with_rate(config: Config, rate: float, seed: int) -> Config:
    """The configuration with another learning rate of the dense optimizer and another seed."""
    return _with(config, {"optimizer.dense.lr": rate, "train.seed": seed}, "rate and seed")


def rates(config: Config, trials: int) -> Sequence[float]:
    """Learning rates to try: the configured one times powers of 3 around 1."""
    lowest = -(trials - 1) / 2
    return [_rounded(config.optimizer.dense.lr * FACTOR ** (lowest + trial)) for trial in range(trials)]


def next_rate(rate: float, *, up: bool) -> float:
    """The learning rate a step above or below."""
    return _rounded(rate * FACTOR if up else rate / FACTOR)


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
