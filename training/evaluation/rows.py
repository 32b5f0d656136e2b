"""The labelled rows of an evaluation, in the encoding of a model, or the same rows in those of two models."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from features.dataset import FILE, LABEL, LINE, PreparedDataset
from features.errors import InputError
from features.files import read_json
from features.prepare import prepare
from serving.bundle import Bundle
from training.evaluation.names import Known, known_values


@dataclass(frozen=True)
class Rows:
    """Labelled rows in a model's encoding, where they come from, and values by which ids that are hashes are named.

    `sampled`: whether negatives are missing among them, dropped when preparing or before the rows arrived.
    """

    table: pa.Table
    source: str
    known: Known = field(default_factory=dict)
    sampled: bool = False


def rows_of_dataset(bundle: Bundle, dataset: PreparedDataset, split: str) -> Rows:
    """A split of prepared data; InputError unless it was encoded by the model's own pipeline."""
    dataset.require_pipeline(bundle.pipeline.digest, f"model {bundle.name}")
    return Rows(dataset.split(split), f"{split} split of {dataset.path}", _known(dataset), _sampled(dataset, split))


def rows_of_files(bundle: Bundle, sources: Sequence[str], max_bad_rows: float) -> Rows:
    """Raw labelled files, encoded by the model's pipeline; rows that its schema cannot read are left out."""
    with tempfile.TemporaryDirectory(prefix="masknet-evaluate-") as folder:
        data = Path(folder) / "data"
        prepare(bundle.schema, {"test": list(sources)}, data, pipeline=bundle.pipeline, max_bad_rows=max_bad_rows)
        dataset = PreparedDataset.open(data)
        return Rows(dataset.split("test"), ", ".join(sources), _known(dataset), _sampled(dataset, "test"))


def same_rows_of_files(first: Bundle, second: Bundle, sources: Sequence[str], max_bad_rows: float) -> tuple[Rows, Rows]:
    """Raw labelled files for two models, row by row the same, each encoded by its model's own pipeline.

    Rows that either schema cannot read are left out of both, by their file and line.

    Raises:
        InputError: the models do not mean the same by a click, or no row can be read by both.
    """
    one = rows_of_files(first, sources, max_bad_rows)
    if first.pipeline.digest == second.pipeline.digest and first.schema == second.schema:
        return one, one
    other = rows_of_files(second, sources, max_bad_rows)
    kept_N, taken_N = _common(one.table, other.table)
    if len(kept_N) == 0:
        raise InputError(f"{one.source}: no row can be read by both {first.name} and {second.name}")
    tables = one.table.take(pa.array(kept_N)), other.table.take(pa.array(taken_N))
    _require_same_labels(*tables, sources)
    left_out = one.table.num_rows + other.table.num_rows - 2 * len(kept_N)
    aside = f" without {left_out:,} rows that one of the models cannot read" if left_out else ""
    sampled = one.sampled or other.sampled
    return (
        Rows(tables[0], one.source + aside, one.known, sampled),
        Rows(tables[1], other.source + aside, other.known, sampled),
    )


def _sampled(dataset: PreparedDataset, split: str) -> bool:
    return dataset.schema.missing_negatives(split) is not None


def _known(dataset: PreparedDataset) -> Known:
    return known_values(read_json(dataset.path / "profile.json", "prepared data"))


def _common(first: pa.Table, second: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Places in either table of the rows that both have, in the first one's order."""
    place = [FILE, LINE]
    left, right = (
        pl.DataFrame({name: table[name].to_numpy() for name in place}).with_row_index("row")
        for table in (first, second)
    )
    both = left.join(right, on=place, how="inner", maintain_order="left")
    return both["row"].to_numpy(), both["row_right"].to_numpy()


def _require_same_labels(first: pa.Table, second: pa.Table, sources: Sequence[str]) -> None:
    unlike_N = first[LABEL].to_numpy() != second[LABEL].to_numpy()
    if unlike_N.any():
        line = first[LINE][int(unlike_N.argmax())].as_py()
        raise InputError(
            f"{', '.join(sources)}: the two models' schemas do not mean the same by a click: the labels of "
            f"{int(unlike_N.sum()):,} rows differ, the first in line {line}"
        )
