"""Requests are encoded as tables are, bit by bit, however their columns are divided; else it is left to the pipeline.

Legend: N rows.
"""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from features.encoders import (
    AnyEncoder,
    Cross,
    DatePart,
    Hash,
    Identity,
    LogBucket,
    Managed,
    Quantile,
    Scale,
    Vocabulary,
)
from features.fields import CategoricalField
from features.hashing import hash_text
from features.online import Encoded, OnlineEncoder
from features.online_columns import UnusualError
from features.online_text import Texts
from features.pipeline import FeaturePipeline
from features.schema import Schema

N = 7
WORDS = pa.array(["ann", "bob", "7", "drama", "ü€", "1.5", "0"])
FIELDS: list[dict[str, Any]] = [
    {"name": "voc", "type": "categorical"},
    {"name": "hash", "type": "categorical", "encoder": "hash", "buckets": 50},
    {"name": "whole", "type": "categorical", "encoder": "identity", "buckets": 8},
    {"name": "held", "type": "categorical", "encoder": "managed", "buckets": 20, "eviction": "lru"},
    {"name": "same", "type": "categorical", "share_with": "voc"},
    {"name": "tags", "type": "list", "max_length": 3},
    {"name": "last", "type": "list", "share_with": "voc", "max_length": 2, "keep": "last"},
    {"name": "codes", "type": "list", "encoder": "identity", "buckets": 6, "pooling": "sum", "max_length": 2},
    {"name": "helds", "type": "list", "encoder": "managed", "buckets": 20, "eviction": "lfu", "separator": "|"},
    {"name": "age", "type": "numeric", "encoder": "quantile"},
    {"name": "clicks", "type": "numeric", "encoder": "log_bucket", "buckets": 40},
    {"name": "price", "type": "numeric", "encoder": "standard"},
    {"name": "income", "type": "numeric", "encoder": "log1p", "normalize": True},
    {"name": "share", "type": "numeric", "encoder": "minmax"},
    {"name": "place", "type": "categorical", "encoder": "hash", "buckets": 9, "training_only": {"default": "top"}},
    {"name": "delay", "type": "numeric", "encoder": "standard", "training_only": {"default": 2.5}},
    {"name": "hour", "type": "date", "from": "seen", "part": "hour", "timezone": "Asia/Kolkata"},
    {"name": "day", "type": "date", "from": "seen", "part": "weekday", "timezone": "America/New_York"},
    {"name": "voc_x_tags", "type": "cross", "of": ["voc", "tags"], "buckets": 70},
    {"name": "codes_x_age", "type": "cross", "of": ["codes", "age", "hash"], "buckets": 90},
    {"name": "whole_x_hour", "type": "cross", "of": ["whole", "hour", "clicks"], "buckets": 80},
    {"name": "held_x_voc", "type": "cross", "of": ["held", "voc"], "encoder": "managed", "buckets": 30,
     "eviction": "lru"},
]  # fmt: skip
SCHEMA = Schema.model_validate({"name": "online", "label": {"column": "click"}, "fields": FIELDS})
ENCODERS: dict[str, AnyEncoder] = {
    "voc": Vocabulary(WORDS),
    "hash": Hash(50),
    "whole": Identity(8),
    "held": Managed(20, "lru"),
    "tags": Vocabulary(WORDS[2:6]),
    "codes": Identity(6),
    "helds": Managed(20, "lfu"),
    "age": Quantile(np.array([-1.0, 20.0, 40.0])),
    "clicks": LogBucket(40),
    "price": Scale("standard", 10.0, 4.0),
    "income": Scale("log1p"),
    "share": Scale("minmax", 0.0, 8.0),
    "place": Hash(9),
    "delay": Scale("standard", 1.0, 0.5),
    "hour": DatePart(24, "hour", "Asia/Kolkata"),
    "day": DatePart(7, "weekday", "America/New_York"),
    "voc_x_tags": Cross(70),
    "codes_x_age": Cross(90),
    "whole_x_hour": Cross(80),
    "held_x_voc": Managed(30, "lru"),
}
PIPELINE = FeaturePipeline.build(SCHEMA.fields, ENCODERS)
ONLINE = OnlineEncoder(PIPELINE)
TEXT: list[Any] = [*WORDS.to_pylist(), "never seen", "12.0", "-3.00", "1.0.0", "", None, 7, 0, -12, 2**70]
WHOLE: list[Any] = ["0", "7", "07", "8", "123456789012345678", "", None, 5, 10**12]
NUMBER: list[Any] = [0, -1, 20.0, 19.999, 2.5, 1e300, -1e300, 3, None, float("nan"), 2**52, -0.0]
TIME = [datetime(2024, 3, 10, 6, 59, 59, 999999, UTC), datetime(1971, 1, 1), datetime(2031, 11, 2, 5, 30), None]


def drawn(field: dict[str, Any], random: np.random.Generator) -> Any:
    pool = WHOLE if field.get("encoder") == "identity" else NUMBER if field["type"] == "numeric" else TEXT
    if field["type"] != "list":
        return pool[random.integers(len(pool))]
    if random.random() < 0.2:
        return None
    return [pool[random.integers(len(pool))] for _ in range(random.integers(5))]


def columns_of(seed: int) -> dict[str, list[Any]]:
    """A column of N values for each field that is sent, and of times."""
    random = np.random.default_rng(seed)
    sent = [field for field in FIELDS if field["type"] not in ("date", "cross") and "training_only" not in field]
    columns = {field["name"]: [drawn(field, random) for _ in range(N)] for field in sent}
    return columns | {"seen": [TIME[random.integers(len(TIME))] for _ in range(N)]}


def as_text(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Numbers beside text as text, which is what one Arrow column can hold."""

    def text(value: Any) -> Any:
        return (
            [text(item) for item in value] if isinstance(value, list) else str(value) if type(value) is int else value
        )

    numeric = [field["name"] for field in FIELDS if field["type"] == "numeric"]
    plain = {n: [None if v is None else float(v) for v in values] for n, values in columns.items() if n in numeric}
    return {n: plain.get(n) or ([*values] if n == "seen" else text(values)) for n, values in columns.items()}


def require_same(found: Encoded | None, expected: pa.Table) -> None:
    """Every field's ids and values, of which one row stands for all, are the table's."""
    assert found is not None
    assert found.ids.keys() | found.values.keys() == set(expected.column_names)
    for name, (ids_K, lengths_N) in found.ids.items():
        rows = np.split(ids_K, np.cumsum(lengths_N)[:-1]) if lengths_N is not None else ids_K
        plain = [row.tolist() for row in rows]
        assert (plain * N if len(plain) == 1 else plain) == expected[name].to_pylist(), name
    for name, value_N in found.values.items():
        table_N = expected[name].to_numpy().view(np.int32)
        same_N = np.broadcast_to(value_N, N).view(np.int32) == table_N
        assert (same_N | (np.isnan(value_N) & np.isnan(expected[name].to_numpy()))).all(), name


def as_served(columns: dict[str, Any]) -> pa.Table:
    return PIPELINE.as_served(PIPELINE.encode(columns))


@pytest.mark.parametrize("seed", range(12))
def test_columns_of_python_and_of_arrow_are_encoded_as_by_the_pipeline(seed: int) -> None:
    columns = columns_of(seed)
    texts = as_text(columns)
    expected = as_served(pa.table(texts))
    require_same(ONLINE.encode(columns), expected)
    require_same(ONLINE.encode(texts), expected)
    require_same(ONLINE.encode({name: pa.chunked_array([pa.array(v)]) for name, v in texts.items()}), expected)
    kinds = {"voc": pa.large_string(), "same": pa.string_view(), "hash": pa.dictionary(pa.int8(), pa.string())}
    others = {name: pa.array(values).cast(kinds.get(name, pa.array(values).type)) for name, values in texts.items()}
    require_same(ONLINE.encode(others), expected)
    require_same(Encoded.of(expected), expected)


@pytest.mark.parametrize("seed", range(30))
def test_columns_of_one_row_count_for_all(seed: int) -> None:
    columns, random = columns_of(100 + seed), np.random.default_rng(seed)
    once = [name for name in columns if random.random() < 0.5]
    repeated = {name: [values[0]] * N if name in once else values for name, values in columns.items()}
    mixed = {name: values[:1] if name in once else values for name, values in columns.items()}
    expected = as_served(pa.table(as_text(repeated)))
    found = ONLINE.encode(mixed)
    require_same(found, expected)
    texts = as_text(mixed)
    require_same(ONLINE.encode({n: v if n in once else pa.array(v) for n, v in texts.items()}), expected)
    assert found is not None
    single = {
        name for name, ids in found.ids.items() if len(ids.ids_K if ids.lengths_N is None else ids.lengths_N) == 1
    }
    single |= {name for name, values in found.values.items() if len(values) == 1}
    assert single == ONLINE.shared(once)
    require_same(Encoded.of(expected, ONLINE.shared(once)), expected)


def test_what_is_shared() -> None:
    fixed = {"place", "delay"}
    assert ONLINE.shared(()) == fixed
    assert ONLINE.shared(("voc", "tags", "seen")) == fixed | {"voc", "tags", "voc_x_tags", "hour", "day"}
    assert ONLINE.shared(("whole", "clicks")) == fixed | {"whole", "clicks"}
    assert "whole_x_hour" in ONLINE.shared(("whole", "clicks", "seen"))


def test_some_of_the_rows() -> None:
    columns = columns_of(3) | {"voc": ["ann"], "tags": [["7", "drama"]]}
    whole = columns | {"voc": ["ann"] * N, "tags": [["7", "drama"]] * N}
    found = ONLINE.encode(columns)
    assert found is not None
    table = as_served(pa.table(as_text(whole)))
    for start, stop in ((0, 3), (3, 7), (6, 7)):
        part, expected = found.some(start, stop), table.slice(start, stop - start)
        for name, (ids_K, lengths_N) in part.ids.items():
            rows = [ids_K] if lengths_N is None else np.split(ids_K, np.cumsum(lengths_N)[:-1])
            plain = [row.tolist() for row in (ids_K if lengths_N is None else rows)]
            assert (plain * (stop - start) if len(plain) == 1 else plain) == expected[name].to_pylist(), name


@pytest.mark.parametrize(
    "change",
    [
        {"voc": ["a\0b", *"abcdef"]},
        {"voc": [1.5, *"abcdef"]},
        {"voc": [True] * N},
        {"voc": ["\ud800", *"abcdef"]},
        {"voc": ["x" * 4097, *"abcdef"]},
        {"whole": ["-1", *"123456"]},
        {"whole": ["0x1F", *"123456"]},
        {"whole": ["1234567890123456789", *"123456"]},
        {"codes": [["٣"], *[["1"]] * 6]},
        {"tags": ["ann|bob", *[None] * 6]},
        {"age": ["5", *[None] * 6]},
        {"age": [float("inf"), *[1.0] * 6]},
        {"age": [2**60, *[1.0] * 6]},
        {"age": [10**400, *[1.0] * 6]},
        {"age": [True, None, *[1.0] * 5]},
        {"seen": ["no time"] * N},
    ],
)
def test_what_is_not_usual_is_left_to_the_pipeline(change: dict[str, Any]) -> None:
    assert ONLINE.encode(columns_of(5) | change) is None


def test_a_missing_column_is_left_to_the_pipeline() -> None:
    columns = columns_of(5)
    assert ONLINE.encode({name: values for name, values in columns.items() if name != "age"}) is None


@pytest.mark.parametrize("seconds", [0.0, 59.5, 1e8 - 1, 1e8, 1.7e9 + 59.999999, 4e9])
def test_a_time_is_the_minute_s_in_every_zone(seconds: float) -> None:
    moment = datetime.fromtimestamp(seconds, UTC)
    columns = as_text(columns_of(1)) | {"seen": [moment] * N}
    require_same(ONLINE.encode(columns | {"seen": [moment]}), as_served(pa.table(columns)))


def test_fields_without_text() -> None:
    schema = SCHEMA.model_copy(update={"fields": tuple(f for f in SCHEMA.fields if f.name in ("age", "price"))})
    pipeline = FeaturePipeline.build(schema.fields, ENCODERS)
    found = OnlineEncoder(pipeline).encode({"age": [1, None], "price": [12.0]})
    assert found is not None
    assert found.ids["age"].ids_K.tolist() == [3, 0]
    assert found.values["price"].tolist() == [0.5]


@pytest.mark.parametrize("bad", [b"a\0b", b"\xff"])
def test_short_text_of_arrow_is_hashed_as_it_is_only_where_it_is_sound(bad: bytes) -> None:
    """Nothing else in these values needs the careful way."""
    spec = CategoricalField(name="voc", type="categorical")
    column = pa.array([b"ann", None, b"bob"]).view(pa.string())
    texts = Texts([column], [spec], ["vocabulary"])
    assert texts.hash_M.tolist() == hash_text(column).tolist()
    assert texts.missing_M.tolist() == [False, True, False]
    with pytest.raises(UnusualError):
        Texts([pa.array([b"ann", bad]).view(pa.string())], [spec], ["vocabulary"])
