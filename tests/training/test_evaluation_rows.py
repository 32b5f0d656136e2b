"""The same raw rows for two models, each with a pipeline and a schema of its own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import polars as pl
import pytest

from features.dataset import FILE, LABEL, LINE, PreparedDataset
from features.errors import InputError
from features.prepare import prepare
from features.schema import Schema
from serving.bundle import Bundle
from training.evaluation.rows import rows_of_dataset, rows_of_files, same_rows_of_files

ITEM = {"name": "item", "type": "categorical", "encoder": "hash", "buckets": 100}
PRICE = {"name": "price", "type": "numeric", "encoder": "standard"}
AGE = {"name": "age", "type": "numeric", "encoder": "quantile", "buckets": 4}
LABELS: dict[str, Any] = {"column": "click"}


def model(folder: Path, name: str, fields: list[dict[str, Any]], label: dict[str, Any] = LABELS) -> Bundle:
    """What the evaluation's rows take of a bundle: a schema, and a pipeline fitted on good rows."""
    schema = Schema.model_validate({"name": name, "label": label, "context": [], "fields": fields})
    good = folder / f"{name}.parquet"
    rows = {"item": ["a", "b", "c", "d"], "price": ["1", "2", "3", "4"], "age": ["20", "30", "40", "50"]}
    pl.DataFrame({**rows, "click": ["0", "1", "1", "0"]}).write_parquet(good)
    prepare(schema, {"train": [str(good)]}, folder / name)
    return cast(
        Bundle, SimpleNamespace(name=name, schema=schema, pipeline=PreparedDataset.open(folder / name).pipeline)
    )


@pytest.fixture
def raw(tmp_path: Path) -> list[str]:
    """Two files of four rows; the price is bad in line 2 of the first, the age in line 3 of both."""
    for name, clicks in (("x", ["0", "1", "1", "0"]), ("y", ["1", "1", "0", "0"])):
        rows = {"item": ["a", "b", "c", "e"], "price": ["1", "2", "3", "4"], "age": ["20", "30", "old", "50"]}
        if name == "x":
            rows["price"][1] = "cheap"
        pl.DataFrame({**rows, "click": clicks}).write_csv(tmp_path / f"{name}.csv")
    return [str(tmp_path / "x.csv"), str(tmp_path / "y.csv")]


def test_rows_that_either_cannot_read_are_left_out_of_both(tmp_path: Path, raw: list[str]) -> None:
    first, second = model(tmp_path, "first", [ITEM, PRICE]), model(tmp_path, "second", [AGE, ITEM])
    one, other = same_rows_of_files(first, second, raw, max_bad_rows=0.5)
    for rows in (one, other):  # lines count from the header's
        assert list(zip(rows.table[FILE].to_pylist(), rows.table[LINE].to_pylist(), strict=True)) == [
            (0, 2), (0, 5), (1, 2), (1, 3), (1, 5),
        ]  # fmt: skip
        assert rows.table[LABEL].to_pylist() == [0, 0, 1, 1, 0]
        assert rows.source == f"{raw[0]}, {raw[1]} without 3 rows that one of the models cannot read"
    good = pl.DataFrame({"item": ["a", "e", "a", "b", "e"], "price": ["1", "4", "1", "2", "4"]})
    expected = first.pipeline.encode(good.to_arrow())
    assert one.table.select(["item", "price"]).equals(expected)
    assert set(other.table.column_names) >= {"age", "item"}
    assert "price" not in other.table.column_names


def test_one_encoding_serves_equal_pipelines(tmp_path: Path, raw: list[str]) -> None:
    first = model(tmp_path, "first", [ITEM, PRICE])
    one, other = same_rows_of_files(first, first, raw, max_bad_rows=0.5)
    assert one is other
    assert one.table.num_rows == 7


def test_another_meaning_of_a_click_is_refused(tmp_path: Path, raw: list[str]) -> None:
    first = model(tmp_path, "first", [ITEM])
    second = model(tmp_path, "second", [ITEM], {"column": "click", "positive": "< 1"})
    with pytest.raises(InputError, match=r"do not mean the same by a click: the labels of 8 rows differ, .* line 2"):
        same_rows_of_files(first, second, raw, max_bad_rows=0.5)


def test_no_row_that_both_can_read(tmp_path: Path) -> None:
    first, second = model(tmp_path, "first", [ITEM, PRICE]), model(tmp_path, "second", [ITEM, AGE])
    rows = {"item": ["a", "b"], "price": ["1", "cheap"], "age": ["young", "30"], "click": ["0", "1"]}
    pl.DataFrame(rows).write_csv(tmp_path / "bad.csv")
    with pytest.raises(InputError, match=r"bad\.csv: no row can be read by both first and second"):
        same_rows_of_files(first, second, [str(tmp_path / "bad.csv")], max_bad_rows=0.5)


@pytest.mark.parametrize(
    ("sampling", "test", "train"),
    [
        ({}, False, False),
        ({"negative_sampling": {"rate": 0.5}}, False, True),
        ({"already_sampled": {"rate": 0.5}}, True, True),
        ({"negative_sampling": {"rate": 1.0}, "already_sampled": {"rate": 1.0}}, False, False),
    ],
)
def test_rows_know_whether_negatives_are_missing(
    tmp_path: Path, sampling: dict[str, Any], test: bool, train: bool
) -> None:
    schema = Schema.model_validate({"name": "m", "label": LABELS, "fields": [ITEM], **sampling})
    raw, other = tmp_path / "raw.parquet", tmp_path / "other.parquet"
    for file in (raw, other):
        pl.DataFrame({"item": ["a", "b", "c", "d"], "click": ["1", "1", "1", "0"]}).write_parquet(file)
    prepare(schema, {"train": [str(other)], "test": [str(raw)]}, tmp_path / "data")
    dataset = PreparedDataset.open(tmp_path / "data")
    bundle = cast(Bundle, SimpleNamespace(name="m", schema=schema, pipeline=dataset.pipeline))
    assert rows_of_dataset(bundle, dataset, "test").sampled == test
    assert rows_of_dataset(bundle, dataset, "train").sampled == train
    assert rows_of_files(bundle, [str(raw)], 0.0).sampled == test
    assert same_rows_of_files(bundle, bundle, [str(raw)], 0.0)[1].sampled == test
