"""Every kind of field and encoder, against values worked out by hand or by another library."""

import math
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import xxhash

from features.counting import NumberCounts, TextCounts, count_text
from features.errors import InputError
from features.fitting import fit_pipeline
from features.pipeline import FeaturePipeline
from features.schema import Schema
from features.times import as_seconds

Columns = dict[str, list[Any]]


def fit(fields: list[dict[str, Any]], rows: Columns, **keys: Any) -> FeaturePipeline:
    return fit_pipeline(Schema.model_validate({"name": "t", "label": {"column": "y"}, "fields": fields, **keys}), rows)


def test_identity_keeps_whole_numbers_and_checks_them() -> None:
    pipeline = fit([{"name": "a", "type": "categorical", "encoder": "identity", "buckets": 5}], {"a": [1]})
    assert pipeline.encode({"a": [0, 4, 5, None, 1000]})["a"].to_pylist() == [2, 6, 1, 0, 1]
    assert pipeline.encode({"a": ["0", "4.0", "", None]})["a"].to_pylist() == [2, 6, 0, 0]
    for bad in ("-1", "x", "1.5", "1e3"):
        with pytest.raises(InputError, match=f"row 1, column 'a': '{bad}' is no whole number of 0 or more"):
            pipeline.encode({"a": ["1", bad]})


def test_lists_keep_the_first_or_the_last_items() -> None:
    fields = [
        {"name": "f", "type": "list", "separator": "|", "min_count": 1, "max_length": 2},
        {"name": "l", "type": "list", "separator": "|", "min_count": 1, "max_length": 2, "keep": "last"},
    ]
    rows = {"f": ["a|b|c", "", "||b", None], "l": ["a|b|c", "", "c||", None]}
    pipeline = fit(fields, rows)
    assert pipeline.encode(rows)["f"].to_pylist() == [[3, 2], [0], [2], [0]]  # b twice, a once; c is beyond the second
    assert pipeline.encode(rows)["l"].to_pylist() == [[3, 2], [0], [2], [0]]  # c twice, b once
    same = {"f": [["a", "b", "c"], [], [None, "b"], None], "l": [["a", "b", "c"], [], ["c", None, ""], None]}
    assert pipeline.encode(same).equals(pipeline.encode(rows))


def test_shared_fields_are_fitted_on_the_union_and_have_equal_ids() -> None:
    fields = [
        {"name": "item", "type": "categorical", "min_count": 2},
        {"name": "history", "type": "list", "separator": " ", "share_with": "item", "max_length": 9},
    ]
    rows = {"item": ["a", "b", "c"], "history": ["b c", "c", ""]}
    pipeline = fit(fields, rows)
    assert pipeline.encode(rows).to_pydict() == {"item": [1, 3, 2], "history": [[3, 2], [2], [0]]}  # c 3 times, b twice
    shared = pipeline.fields[1]
    assert (shared.owner, shared.encoder, shared.pooling) == ("item", pipeline.fields[0].encoder, "mean")


def test_log_bucket_is_the_square_of_the_logarithm() -> None:
    pipeline = fit([{"name": "n", "type": "numeric", "encoder": "log_bucket"}], {"n": [1.0]})
    values = [-10.0, -3.0, -2.5, -1.0, 0.0, 1.0, 2.0, 2.5, 3.0, 5.0, 100.0, 1e6, 1e300, None]
    below = [2, 2, 2, 4, 5, 6, 7]  # −3 and less, −3, −3 (from −2.5), −1, 0, 1, 2
    above = [2 + 6 + math.floor(math.log(value) ** 2) for value in (2.5, 3.0, 5.0, 100.0, 1e6)]
    last = 2 + 512 - 1
    assert pipeline.encode({"n": values})["n"].to_pylist() == [*below, *above, last, 0]


def test_values_are_scaled_and_missing_ones_are_null() -> None:
    random = np.random.default_rng(0)
    numbers = random.normal(3, 7, 1000)
    fields = [{"name": kind, "type": "numeric", "encoder": kind} for kind in ("standard", "log1p", "minmax")]
    ids = {"name": "id", "type": "categorical"}
    pipeline = fit([*fields, ids], {**dict.fromkeys(("standard", "log1p", "minmax"), numbers), "id": ["x"] * 1000})
    rows = {kind: [float(numbers[0]), None, 1e9, -1e9] for kind in ("standard", "log1p", "minmax")} | {"id": [None] * 4}
    encoded = pipeline.encode(rows)
    mean, deviation, low, high = numbers.mean(), numbers.std(), numbers.min(), numbers.max()
    for name, expected in {
        "standard": [(value - mean) / deviation for value in (numbers[0], 1e9, -1e9)],
        "log1p": [math.copysign(math.log1p(abs(value)), value) for value in (numbers[0], 1e9, -1e9)],
        "minmax": [(numbers[0] - low) / (high - low), 1.0, 0.0],
    }.items():
        found = encoded[name].to_pylist()
        assert found[1] is None
        assert [found[0], *found[2:]] == pytest.approx(expected, rel=1e-6)
    constant = fit([fields[0], ids], {"standard": [5.0, 5.0], "id": ["x", "x"]})
    assert constant.encode({"standard": [5.0, 6.0], "id": [None, None]})["standard"].to_pylist() == [0.0, 1.0]


def combined(*hashes: int) -> int:
    """The definition of a cross, in plain integers."""
    mask, value = 2**64 - 1, 0
    for part in hashes:
        value = (value + part) * 0x9E3779B97F4A7C15 & mask
        value ^= value >> 29
    return mixed(value)


def mixed(value: int) -> int:
    mask = 2**64 - 1
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
    return value ^ (value >> 31)


def test_crosses_hash_the_values_of_their_parts() -> None:
    fields: list[dict[str, Any]] = [
        {"name": "user", "type": "categorical", "min_count": 9},
        {"name": "tags", "type": "list", "separator": " ", "pooling": "sum"},
        {"name": "price", "type": "numeric", "buckets": 2},
        {"name": "user_x_tags", "type": "cross", "of": ["user", "tags"], "buckets": 1000},
        {"name": "price_x_user", "type": "cross", "of": ["price", "user"], "buckets": 77},
    ]
    rows: Columns = {"user": ["u", "u", None, "w"], "tags": ["a b", "", "a", "c"], "price": [1.0, 2.0, 3.0, None]}
    pipeline = fit(fields, rows)
    encoded = pipeline.encode(rows).to_pydict()
    text = {value: xxhash.xxh3_64_intdigest(value.encode(), 0) for value in ("u", "a", "b", "w", "c")}
    # the value counts and not its id: u and w are both never seen, since min_count is 9
    pairs = [2 + combined(text[user], text[tag]) % 1000 for user, tag in (("u", "a"), ("u", "b"), ("w", "c"))]
    assert encoded["user_x_tags"] == [pairs[:2], [0], [0], pairs[2:]]
    assert encoded["price"] == [2, 3, 3, 0]
    price = [2 + combined(mixed(bucket + 1), text["u"]) % 77 for bucket in (2, 3)]
    assert encoded["price_x_user"] == [*price, 0, 0]
    assert {field.name: field.pooling for field in pipeline.fields}["user_x_tags"] == "sum"


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata"])
def test_dates_are_parts_of_the_local_time(zone: str) -> None:
    parts = ("hour", "weekday", "day", "month")
    fields = [{"name": part, "type": "date", "from": "at", "part": part, "timezone": zone} for part in parts]
    pipeline = fit(fields, {"at": [0]})
    times = [
        datetime(2026, 3, 29, 0, 59, tzinfo=UTC),
        datetime(2026, 12, 31, 23, 30, tzinfo=UTC),
        datetime(1999, 1, 1, tzinfo=UTC),
    ]
    local = [time.astimezone(ZoneInfo(zone)) for time in times]
    expected = {
        "hour": [2 + time.hour for time in local],
        "weekday": [2 + time.weekday() for time in local],
        "day": [1 + time.day for time in local],
        "month": [1 + time.month for time in local],
    }
    seconds = [time.timestamp() for time in times]
    iso = [time.isoformat() for time in times]
    for column in (seconds, [str(value) for value in seconds], iso, times, pd.Series(times), pa.array(times)):
        rows = pd.DataFrame({"at": column}) if isinstance(column, pd.Series) else pa.table({"at": column})
        assert pipeline.encode(rows).to_pydict() == expected
    assert pipeline.encode({"at": [None, ""]})["hour"].to_pylist() == [0, 0]
    with pytest.raises(InputError, match="row 1, column 'at': 'noon' is no time"):
        pipeline.encode({"at": ["2026-01-01", "noon"]})


def test_times_are_seconds_or_iso_each_by_itself_and_nothing_is_guessed() -> None:
    good = {
        "2026-01-02": "2026-01-02T00:00:00+00:00",
        "2026-01-02T03:04": "2026-01-02T03:04:00+00:00",
        "2026-01-02 03:04:05.25": "2026-01-02T03:04:05.250+00:00",
        "2026-01-02T03:04:05Z": "2026-01-02T03:04:05+00:00",
        "2026-01-02T03:04:05+0530": "2026-01-02T03:04:05+05:30",
        "2026-01-02T03:04:05-03:30": "2026-01-02T03:04:05-03:30",
        "12.5": "1970-01-01T00:00:12.500+00:00",
    }
    texts = [*good, "", None]
    expected = [datetime.fromisoformat(value).timestamp() for value in good.values()]
    for order in (range(len(texts)), range(len(texts) - 1, -1, -1)):
        values, bad_N = as_seconds(pa.array([texts[i] for i in order]), "t", None)
        assert bad_N is None
        found = dict(zip(order, values.to_pylist(), strict=True))
        assert [found[i] for i in range(len(texts))] == [*expected, None, None]
    for bad in ("03/04/2024", "03-04-2024", "2024-13-01", "2024-02-30", "2024-01-01T25:00", "now", "1e400"):
        assert as_seconds(pa.array(["2026-01-02", bad]), "t", None)[1].tolist() == [False, True]  # type: ignore[union-attr]


def test_dates_are_read_by_their_format() -> None:
    fields = [{"name": "h", "type": "date", "from": "hour", "part": "hour", "format": "%y%m%d%H"}]
    pipeline = fit(fields, {"hour": ["14102100"]})
    assert pipeline.encode({"hour": ["14102123", "14102100", None]})["h"].to_pylist() == [25, 2, 0]
    assert pipeline.encode({"hour": [14102123]})["h"].to_pylist() == [25]
    with pytest.raises(InputError, match="'14102124' is no time"):
        pipeline.encode({"hour": ["14102124"]})


def test_training_only_fields_may_be_absent_and_are_served_as_their_default() -> None:
    fields = [
        {"name": "a", "type": "categorical", "min_count": 1},
        {
            "name": "position",
            "type": "categorical",
            "encoder": "identity",
            "buckets": 9,
            "training_only": {"default": 1},
        },
        {"name": "dwell", "type": "numeric", "encoder": "standard", "training_only": {"default": 2.0}},
    ]
    pipeline = fit(fields, {"a": ["x", "x"], "position": [1, 2], "dwell": [1.0, 3.0]})
    rows = {"a": ["x", "y"], "position": [4, 5], "dwell": [1.0, None]}
    assert pipeline.encode(rows).to_pydict() == {"a": [2, 1], "position": [6, 7], "dwell": [-1.0, None]}
    served = {"a": [2, 1], "position": [3, 3], "dwell": [0.0, 0.0]}
    assert pipeline.as_served(pipeline.encode(rows)).to_pydict() == served
    assert pipeline.encode({"a": ["x", "y"]}).to_pydict() == served


@pytest.mark.parametrize(("value", "rule"), [("x" * 5000, "is longer than 4096 bytes"), ("a\0b", "contains a NUL")])
def test_values_that_are_broken_are_refused(value: str, rule: str) -> None:
    pipeline = fit([{"name": "a", "type": "categorical"}, {"name": "l", "type": "list"}], {"a": ["x"], "l": [["y"]]})
    with pytest.raises(InputError, match=rf"row 1, column 'a': .* {rule}"):
        pipeline.encode({"a": ["x", value], "l": [["y"], ["y"]]})
    with pytest.raises(InputError, match=rf"row 1, column 'l': .* {rule}"):
        pipeline.encode({"a": ["x", "x"], "l": [[], ["y", value]]})


def test_counting_text_beyond_memory_gives_the_same_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    values = [f"v{rank}" for rank in random.zipf(1.3, 20_000) % 5000]
    expected = TextCounts()
    expected.add(count_text(pa.array(values)))
    monkeypatch.setattr("features.counting.SPILL_ROWS", 700)
    monkeypatch.setattr("features.counting._PENDING", 200)
    spilled = TextCounts()
    for part in np.array_split(np.array(values), 40):
        spilled.add(count_text(pa.array(part.tolist())))
    for options in ((2, None), (1, 50)):
        whole = TextCounts()
        whole.add(count_text(pa.array(values)))
        again = TextCounts()
        for part in np.array_split(np.array(values), 40):
            again.add(count_text(pa.array(part.tolist())))
        assert again._spill is not None
        assert again.vocabulary(*options).values.equals(whole.vocabulary(*options).values)
    assert spilled.vocabulary(1, None).values.equals(expected.vocabulary(1, None).values)


def test_counting_numbers_merges_in_any_order_within_the_error_it_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.counting.DISTINCT", 500)
    random = np.random.default_rng(5)
    numbers = np.concatenate([random.lognormal(0, 3, 9_000), -random.lognormal(0, 1, 1_000)])
    levels = np.array([0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0])
    found, errors = [], set()
    for seed in range(4):
        parts = np.array_split(np.random.default_rng(seed).permutation(numbers), 7 + seed)
        counts = NumberCounts()
        for part in parts:
            counts.add(NumberCounts.of(pa.array(part)))
        found.append(counts.quantiles(levels).tolist())
        errors.add(counts.relative_error)
    assert all(quantiles == found[0] for quantiles in found)
    (error,) = errors
    assert 0 < error < 0.2  # 500 values over dozens of powers of two leave few digits
    np.testing.assert_allclose(found[0], np.quantile(numbers, levels, method="lower"), rtol=error)


def test_quantiles_of_few_distinct_numbers_are_exact() -> None:
    numbers = np.random.default_rng(1).integers(-5, 5, 1000).astype(float)
    levels = np.arange(1, 32) / 32
    counts = NumberCounts.of(pa.array(numbers))
    assert counts.relative_error == 0.0
    assert counts.quantiles(levels).tolist() == np.quantile(numbers, levels, method="lower").tolist()


def test_bytes_that_are_no_text_are_refused_in_every_kind_of_field() -> None:
    fields = [
        {"name": "a", "type": "categorical", "min_count": 1},
        {"name": "l", "type": "list", "separator": " ", "min_count": 1},
        {"name": "n", "type": "numeric"},
        {"name": "d", "type": "date", "from": "t", "part": "hour"},
    ]
    good: dict[str, list[Any]] = {"a": ["ü", "x"], "l": ["ü", "x"], "n": ["1", "2"], "t": ["1", "2"]}
    pipeline = fit(fields, good)
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 2, 3], np.int32)), pa.py_buffer(b"\xc3\xbc\xff"))
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), broken)
    table = pa.table(good)
    for name, column in (("a", broken), ("l", broken), ("l", lists)):
        with pytest.raises(InputError, match=f"row 1, column '{name}'.*is not UTF-8"):
            pipeline.encode(table.set_column(table.column_names.index(name), name, column))
    bad_number = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"1\xff"))
    for name, rule in (("n", "is not a finite number"), ("t", "is no time")):
        with pytest.raises(InputError, match=f"row 1, column '{name}'.*{rule}"):
            pipeline.encode(table.set_column(table.column_names.index(name), name, bad_number))


def test_pandas_frames_hold_lists_as_arrays() -> None:
    pipeline = fit([{"name": "l", "type": "list", "min_count": 1}], {"l": [["a", "a"], ["b"]]})
    frame = pd.DataFrame({"l": [np.array(["b", "a"], object), None, np.array([], object)]})
    assert pipeline.encode(frame)["l"].to_pylist() == [[3, 2], [0], [0]]


def test_half_precision_ids_are_text_like_any_other() -> None:
    pipeline = fit([{"name": "a", "type": "categorical", "min_count": 1}], {"a": ["7"]})
    assert pipeline.encode({"a": np.array([7, 8], np.float16)})["a"].to_pylist() == [2, 1]


def test_a_table_of_no_batches_has_no_rows() -> None:
    fields = [{"name": "a", "type": "categorical"}, {"name": "n", "type": "numeric"}, {"name": "l", "type": "list"}]
    pipeline = fit(fields, {"a": ["x"] * 10, "n": [1.0] * 10, "l": [["y"]] * 10})
    schema = pa.schema([("a", pa.large_string()), ("n", pa.float64()), ("l", pa.large_list(pa.string()))])
    encoded = pipeline.encode(pa.Table.from_batches([], schema))
    assert (encoded.column_names, encoded.num_rows) == (["a", "n", "l"], 0)
