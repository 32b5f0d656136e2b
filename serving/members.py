"""A bundle's members: trained weights of one shape over the same encoded rows, a folder each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from features.errors import InputError, one_line
from masknet.config import MaskNetConfig
from masknet.model import MaskNet, Table
from masknet.values import ValueField


@dataclass(frozen=True)
class Member:
    """A trained model's weights: all but the tables' (`MaskNet.dense_state`), and whole tables by their names.

    `run_id` is the MLflow run that trained it, or None.
    """

    network: dict[str, torch.Tensor]
    tables: dict[str, torch.Tensor]
    run_id: str | None = None

    @classmethod
    def of(cls, model: MaskNet, run_id: str | None = None) -> "Member":
        """A model's weights as they are."""
        bags = model.embeddings.embedding_bags.values()
        tables = {name: bag.weight.detach() for name, bag in zip(model.table_names, bags, strict=True)}
        return cls(model.dense_state(), tables, run_id)


def save_members(folder: Path, members: Sequence[Member], tables: Sequence[Table]) -> None:
    """Write members/00/, members/01/, … into a bundle's folder."""
    for number, member in enumerate(members):
        place = _place(folder, number)
        (place / "embeddings").mkdir(parents=True)
        save_file(member.network, place / "network.safetensors")
        for index, table in enumerate(tables):
            save_file({"weight": member.tables[table.name]}, _table_file(place, index), metadata={"field": table.name})


def load_members(
    folder: Path, count: int, config: MaskNetConfig, tables: tuple[Table, ...], fields: tuple[str | ValueField, ...]
) -> list[MaskNet]:
    """The models of a bundle's `count` members; InputError where weights are not of this shape."""
    models = [MaskNet(config, tables, fields) for _ in range(count)]
    for number, model in enumerate(models):
        place = _place(folder, number)
        try:
            weights = [load_file(_table_file(place, index))["weight"] for index in range(len(tables))]
            model.load_weights(load_file(place / "network.safetensors"), weights)
        except (SafetensorError, OSError, RuntimeError, KeyError) as error:
            raise InputError(f"bundle {folder}: the weights do not fit the model: {one_line(error)}") from None
    return models


def _place(folder: Path, number: int) -> Path:
    return folder / "members" / f"{number:02d}"


def _table_file(place: Path, index: int) -> Path:
    return place / "embeddings" / f"{index:03d}.safetensors"  # field names may hold what file names cannot
