"""What `encode` gives online is what `prepare` wrote, for random schemas and values, in every kind of input."""

import json
import math
import string
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.dataset import PreparedDataset
from features.pipeline import FeaturePipeline
from features.prepare import prepare
from features.schema import Schema

# no NUL: such values are set aside; no surrogates: they are no text
WORDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12) | st.sampled_from(
    ["a", "b", "7", "7.0", "07", "-0.0", "True", "null", "NaN", "é", "e\u0301", " a", "a "]
)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1.0, 2.0, 5e-324, 1.7e308])
WHOLE = st.integers(0, 12) | st.integers(0, 2**53)


def optional(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """A schema and rows for it."""
    count = draw(st.integers(1, 8))
    columns = {
        "c": (optional(WORDS | WHOLE.map(str)), {"type": "categorical", "min_count": draw(st.integers(1, 3))}),
        "h": (optional(WORDS), {"type": "categorical", "encoder": "hash", "buckets": draw(st.integers(1, 50))}),
        "m": (
            optional(WORDS | WHOLE.map(str)),
            {
                "type": "categorical",
                "encoder": "managed",
                "buckets": 3,
                "eviction": draw(st.sampled_from(["lfu", "lru"])),
            },
        ),
        "i": (optional(WHOLE), {"type": "categorical", "encoder": "identity", "buckets": draw(st.integers(1, 10))}),
        "l": (
            optional(st.lists(optional(WORDS), max_size=4)),
            {
                "type": "list",
                "min_count": 1,
                "max_length": draw(st.integers(1, 3)),
                "keep": draw(st.sampled_from(["first", "last"])),
            },
        ),
        "n": (optional(NUMBERS), {"type": "numeric", "encoder": draw(st.sampled_from(["quantile", "log_bucket"]))}),
        "v": (
            optional(NUMBERS),
            {"type": "numeric", "encoder": draw(st.sampled_from(["standard", "log1p", "minmax"]))},
        ),
        "s": (optional(WORDS), {"type": "categorical", "share_with": "c"}),
    }
    fields: list[dict[str, Any]] = [{"name": name, **spec} for name, (_, spec) in columns.items()]
    fields.append({"name": "d", "type": "date", "from": "t", "part": draw(st.sampled_from(["hour", "weekday"]))})
    fields.append({"name": "x", "type": "cross", "of": ["c", "l", "n"], "buckets": draw(st.integers(1, 99))})
    fields.append({"name": "xm", "type": "cross", "of": ["m", "i"], "encoder": "managed", "buckets": 9})
    rows = {name: draw(st.lists(values, min_size=count, max_size=count)) for name, (values, _) in columns.items()}
    rows["t"] = draw(st.lists(optional(st.floats(-6e10, 2.5e11)), min_size=count, max_size=count))
    schema = {"name": "t", "label": {"column": "y"}, "fields": draw(st.permutations(fields))}
    return schema, rows | {"y": [0] * count}


TYPES = {
    "c": pa.string(), "h": pa.string(), "m": pa.string(), "i": pa.int64(), "l": pa.list_(pa.string()),
    "n": pa.float64(), "v": pa.float64(), "s": pa.string(), "t": pa.float64(), "y": pa.int64(),
}  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(case=cases())
def test_prepared_and_online_ids_are_equal(
    case: tuple[dict[str, Any], dict[str, list[Any]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    schema, rows = case
    folder = tmp_path_factory.mktemp("case")
    table = pa.table({name: pa.array(values, TYPES[name]) for name, values in rows.items()})
    for split in ("train", "valid", "test"):
        pq.write_table(table, folder / f"{split}.parquet")
    sources = {split: [str(folder / f"{split}.parquet")] for split in ("train", "valid", "test")}
    prepare(Schema.model_validate(schema), sources, folder / "data", max_bad_rows=0.0)
    dataset = PreparedDataset.open(folder / "data")
    pipeline = FeaturePipeline.load(folder / "data" / "pipeline")
    written = dataset.split("test").select(list(pipeline.names))
    by_row = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    for given_rows in (table, rows, by_row, json.loads(json.dumps(rows)), pd.DataFrame(rows, dtype=object)):
        assert pipeline.encode(given_rows).equals(written)
    assert pipeline.digest == dataset.manifest["pipeline_digest"]


PRINTABLE = st.text(st.sampled_from(string.ascii_letters + string.digits + " ,;|'\"éß漢"), max_size=9)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    values=st.lists(
        st.tuples(PRINTABLE, NUMBERS, st.lists(st.sampled_from(["p", "q", "é"]), max_size=3)), min_size=3, max_size=8
    )
)
def test_the_same_rows_as_text_encode_alike(
    values: list[tuple[str, float, list[str]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder: Path = tmp_path_factory.mktemp("case")
    fields = [
        {"name": "c", "type": "categorical", "min_count": 1},
        {"name": "n", "type": "numeric", "buckets": 3},
        {"name": "l", "type": "list", "separator": "|", "min_count": 1},
    ]
    schema = Schema.model_validate({"name": "t", "label": {"column": "y"}, "fields": fields})
    frame = pd.DataFrame([(c, n, "|".join(items), 0) for c, n, items in values], columns=["c", "n", "l", "y"])
    frame.to_csv(folder / "a.csv", index=False)
    frame.to_csv(folder / "b.csv.gz", index=False)
    frame.to_csv(folder / "c.csv", index=False)
    sources = {"train": [str(folder / "a.csv")], "valid": [str(folder / "b.csv.gz")], "test": [str(folder / "c.csv")]}
    prepare(schema, sources, folder / "data", max_bad_rows=0.0)
    dataset = PreparedDataset.open(folder / "data")
    columns = {"c": [c for c, _, _ in values], "n": [n for _, n, _ in values], "l": [items for *_, items in values]}
    encoded = dataset.pipeline.encode(columns)
    assert all(math.isfinite(n) for n in columns["n"])
    for split in ("train", "valid", "test"):
        assert dataset.split(split).select(["c", "n", "l"]).equals(encoded)
