"""Encoders and the pipeline: ids against values worked out by hand, and the same ids from every kind of input."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import xxhash

from features.columns import as_numbers
from features.columns import as_strings as canonical_strings
from features.counting import NumberCounts, TextCounts, count_text
from features.encoders import Hash, Quantile, Vocabulary
from features.errors import InputError
from features.fitting import fit_pipeline
from features.hashing import hash_text
from features.lookup import Lookup
from features.pipeline import FeaturePipeline
from features.schema import Schema

SCHEMA = Schema.model_validate(
    {
        "name": "t",
        "label": {"column": "click"},
        "fields": [
            {"name": "shop", "type": "categorical", "min_count": 1},
            {"name": "word", "type": "categorical", "encoder": "hash", "buckets": 7},
            {"name": "tags", "type": "list", "separator": " ", "min_count": 1, "max_length": 3},
            {"name": "price", "type": "numeric", "buckets": 4},
        ],
    }
)
COLUMNS: dict[str, list[Any]] = {
    "shop": ["b", "a", "b", None, ""],
    "word": ["x", "ü", "x", None, ""],
    "tags": ["p q", "q", "", None, "q  p r s"],
    "price": [1.0, 2.0, 3.0, 4.0, None],
    "click": [0, 1, 0, 1, 0],
}


@pytest.fixture
def pipeline() -> FeaturePipeline:
    return fit_pipeline(SCHEMA, COLUMNS)


def as_strings(column: pa.Array, name: str) -> pa.Array:
    return canonical_strings(column, name).values


def vocabulary(values: list[str | None], min_count: int, max_size: int | None = None) -> Vocabulary:
    counts = TextCounts()
    for start in range(0, len(values), 3):  # in parts, as they come from chunks
        counts.add(count_text(pa.array(values[start : start + 3], pa.string())))
    return counts.vocabulary(min_count, max_size)


def quantile(values: list[float | None], buckets: int) -> Quantile:
    counts = NumberCounts.of(pa.array(values, pa.float64()))
    return Quantile(np.unique(counts.quantiles(np.arange(1, buckets) / buckets)))


def test_vocabulary_ids_follow_count_then_value() -> None:
    encoder = vocabulary(["c", "a", "b", "a", None, "b", "once"], min_count=2)
    assert encoder.values.to_pylist() == ["a", "b"]
    (ids,) = Lookup([encoder]).find([(0, hash_text(pa.array(["a", "b", "c", "new"])))])
    assert ids.tolist() == [2, 3, 1, 1]
    assert encoder.num_ids == 4
    assert vocabulary(["c", "a", "b", "a", None, "b"], min_count=1, max_size=2).values.to_pylist() == ["a", "b"]


def test_vocabulary_does_not_depend_on_the_order_of_rows() -> None:
    values = ["z", "z", "m", "m", "a", "a", "q"]
    orders = [np.random.default_rng(seed).permutation(values).tolist() for seed in range(5)]
    found = [vocabulary(order, min_count=1).values.to_pylist() for order in orders]
    assert all(values == ["a", "m", "z", "q"] for values in found)


def test_hash_is_xxh3_of_the_text() -> None:
    ids = Hash(1000).encode(hash_text(pa.array(["hello", "ü", "hello"]))).tolist()
    assert ids[0] == ids[2] == 2 + xxhash.xxh3_64_intdigest(b"hello", 0) % 1000
    assert ids[1] == 2 + xxhash.xxh3_64_intdigest("ü".encode(), 0) % 1000
    assert ids[0] == 2 + 10760762337991515389 % 1000  # the digest itself, so that a change of library is seen


def test_quantile_boundaries_and_edges() -> None:
    encoder = quantile([float(n) for n in range(1, 9)], buckets=4)
    assert encoder.boundaries.tolist() == [2.0, 4.0, 6.0]
    assert encoder.encode(pa.array([-5.0, 1.9, 2.0, 5.9, 6.0, 1e9, None])).tolist() == [2, 2, 3, 4, 5, 5, 0]
    assert encoder.num_ids == 6


def test_quantile_of_a_constant_and_of_nothing() -> None:
    assert quantile([3.0] * 9, buckets=4).boundaries.tolist() == [3.0]
    nothing = quantile([None, None], buckets=4)
    assert nothing.encode(pa.array([None, 7.0])).tolist() == [0, 2]


def test_pipeline_by_hand(pipeline: FeaturePipeline) -> None:
    encoded = pipeline.encode(COLUMNS).to_pydict()
    word = {text: 2 + xxhash.xxh3_64_intdigest(text.encode(), 0) % 7 for text in ("x", "ü")}
    assert encoded["shop"] == [2, 3, 2, 0, 0]
    assert encoded["word"] == [word["x"], word["ü"], word["x"], 0, 0]
    # q occurs 3 times and p twice; s is the fourth of a list of at most three
    assert encoded["tags"] == [[3, 2], [2], [0], [0], [2, 3, 4]]
    assert encoded["price"] == [3, 4, 5, 5, 0]


def test_every_kind_of_input_encodes_alike(pipeline: FeaturePipeline) -> None:
    expected = pipeline.encode(COLUMNS)
    names = list(COLUMNS)
    rows = [dict(zip(names, values, strict=True)) for values in zip(*COLUMNS.values(), strict=True)]
    assert pipeline.encode(rows).equals(expected)
    assert pipeline.encode(pd.DataFrame(COLUMNS)).equals(expected)
    assert pipeline.encode(pd.DataFrame(COLUMNS, dtype=object)).equals(expected)
    assert pipeline.encode(pa.table(COLUMNS)).equals(expected)
    as_text = {name: [None if v is None else str(v) for v in values] for name, values in COLUMNS.items()}
    assert pipeline.encode(as_text).equals(expected)
    as_lists = COLUMNS | {"tags": [["p", "q"], ["q"], [], None, ["q", "p", "r", "s"]]}
    assert pipeline.encode(as_lists).equals(expected)


def test_arrows_encodings_of_the_same_values_are_the_same(pipeline: FeaturePipeline) -> None:
    expected = pipeline.encode(COLUMNS)
    table = pa.table(COLUMNS)
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        columns = {name: table[name].cast(kind) for name in ("shop", "word", "tags")}
        assert pipeline.encode(pa.table(columns | {"price": table["price"]})).equals(expected)
    halves = pa.concat_tables([table.slice(0, 2), table.slice(2)])
    assert pipeline.encode(halves).equals(expected)
    lists = [["p", "q"], ["q"], [], None, ["q", "p", "r", "s"]]
    for kind in (pa.list_(pa.string()), pa.large_list(pa.large_string())):
        assert pipeline.encode(table.set_column(2, "tags", pa.array(lists, kind))).equals(expected)


def test_numbers_in_lists_are_the_text_that_they_are_alone() -> None:
    schema = Schema.model_validate(
        {"name": "t", "label": {"column": "y"}, "fields": [{"name": "l", "type": "list", "min_count": 1}]}
    )
    pipeline = fit_pipeline(schema, {"l": [["1", "2"], ["2"]]})
    for values in ([["2", "1"]], [[2, 1]], [[2.0, 1.0]]):
        assert pipeline.encode({"l": values})["l"].to_pylist() == [[2, 3]]


def test_whole_numbers_beyond_a_doubles_digits_are_numbers_all_the_same() -> None:
    values, bad_N, _ = as_numbers(pa.array([2**63, 2**53 + 1], pa.uint64()), "c")
    assert values.to_pylist() == [2.0**63, 2.0**53]
    assert bad_N is None


def test_numbers_as_ids_are_the_same_as_their_text() -> None:
    expected = ["7", None, "12"]
    assert as_strings(pa.array([7, None, 12]), "c").to_pylist() == expected
    assert as_strings(pa.array([7.0, None, 12.0]), "c").to_pylist() == expected
    assert as_strings(pa.array([7.0, float("nan"), 12.0]), "c").to_pylist() == expected
    assert as_strings(pa.array(["7", "", "12"]), "c").to_pylist() == expected
    assert as_strings(pa.array(["7.0", "", "12.00"]), "c").to_pylist() == expected
    assert as_strings(pa.array([Decimal("7.00"), None, Decimal("12.00")]), "c").to_pylist() == expected
    assert as_strings(pa.array(["7.5", "v1.0", "-3.0", "."]), "c").to_pylist() == ["7.5", "v1.0", "-3", "."]
    assert as_strings(pa.array([2.5, -0.25]), "c").to_pylist() == ["2.5", "-0.25"]
    assert as_strings(pa.array([True, None, False]), "c").to_pylist() == ["True", None, "False"]
    with pytest.raises(InputError, match="digits are lost"):
        as_strings(pa.array([2.0**53 + 2, None]), "c")


def test_numbers_from_text() -> None:
    values, bad_N, _ = as_numbers(pa.array(["1", " 2.5 ", "1e3", "", None, "x", "inf", "nan"]), "c")
    assert values.to_pylist()[:5] == [1.0, 2.5, 1000.0, None, None]
    assert bad_N is not None
    assert bad_N.tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"price": [1.0, "cheap", 3.0, 4.0, 5.0]}, "'price'"),
        ({"price": [1.0, float("inf"), 3.0, 4.0, 5.0]}, "row 1, column 'price'"),
        ({"shop": [["a"]] * 5}, "'shop'"),
        ({"tags": [1, 2, 3, 4, 5]}, "'tags'"),
        ({"tags": [[["a"]]] * 5}, "'tags'"),
    ],
)
def test_what_cannot_be_encoded_is_named(pipeline: FeaturePipeline, change: dict[str, list[Any]], told: str) -> None:
    with pytest.raises(InputError, match=told):
        pipeline.encode(COLUMNS | change)


def test_a_missing_column_is_named(pipeline: FeaturePipeline) -> None:
    with pytest.raises(InputError, match="column 'word' is missing"):
        pipeline.encode({name: values for name, values in COLUMNS.items() if name != "word"})


def test_no_rows(pipeline: FeaturePipeline) -> None:
    encoded = pipeline.encode({name: [] for name in COLUMNS})
    assert encoded.num_rows == 0
    assert encoded.column_names == list(pipeline.names)


def test_saved_and_loaded_is_the_same(pipeline: FeaturePipeline, tmp_path: Path) -> None:
    pipeline.save(tmp_path / "p")
    loaded = FeaturePipeline.load(tmp_path / "p")
    assert loaded.digest == pipeline.digest
    assert loaded.encode(COLUMNS).equals(pipeline.encode(COLUMNS))


def test_digest_changes_with_anything_that_decides_an_id(pipeline: FeaturePipeline) -> None:
    assert fit_pipeline(SCHEMA, COLUMNS).digest == pipeline.digest
    for other in ({"shop": ["b", "a", "b", "a", "a"]}, {"price": [1.0, 2.0, 3.0, 9.0, 9.0]}):
        assert fit_pipeline(SCHEMA, COLUMNS | other).digest != pipeline.digest
    fields = [{**field.plain(), "buckets": 9} if field.name == "word" else field.plain() for field in SCHEMA.fields]
    wider = Schema.model_validate({**SCHEMA.plain(), "fields": fields})
    assert fit_pipeline(wider, COLUMNS).digest != pipeline.digest


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda data: data | {"format": 99}, "reads 2: update it"),
        (lambda data: data | {"digest": "0" * 64}, "does not match its digest"),
        (lambda data: {key: value for key, value in data.items() if key != "fields"}, "damaged"),
        (lambda data: data | {"fields": data["fields"][:2]}, "does not match its digest"),
    ],
)
def test_a_damaged_pipeline_is_refused(pipeline: FeaturePipeline, tmp_path: Path, damage: Any, told: str) -> None:
    pipeline.save(tmp_path / "p")
    path = tmp_path / "p" / "pipeline.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=told):
        FeaturePipeline.load(tmp_path / "p")
