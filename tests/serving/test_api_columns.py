"""Whole columns and single values: the quick look says what the close one says; Arrow says what JSON says."""

import json
import math
from datetime import UTC, datetime
from typing import Any

import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.schema import Schema
from serving.api import arrow, columns, requests
from serving.api.errors import ApiError
from serving.api.values import Check, Sent

SCHEMA = Schema.model_validate(
    {
        "name": "kinds",
        "label": {"column": "click"},
        "context": ["user"],
        "fields": [
            {"name": "user", "type": "categorical"},
            {"name": "slot", "type": "categorical", "encoder": "identity", "buckets": 8},
            {"name": "tags", "type": "list"},
            {"name": "codes", "type": "list", "encoder": "identity", "buckets": 8, "separator": " "},
            {"name": "price", "type": "numeric", "encoder": "log1p"},
            {"name": "hour", "type": "date", "from": "seen", "part": "hour"},
        ],
    }
)
CHECKS = Sent.of(SCHEMA, with_times=True).checks
GOOD: dict[str, list[Any]] = {
    "slot": ["3", "0"],
    "tags": [["a", "b"], None],
    "codes": [["1"], []],
    "price": [1.5, None],
}
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.text(max_size=4)
)
VALUES = st.one_of(SCALARS, st.sampled_from(["12", "", "3.0", "1 2"]), st.lists(SCALARS, max_size=3))
ALIKE = st.one_of(
    st.lists(st.text(max_size=4), max_size=4),
    st.lists(st.integers(-(2**63), 2**64 - 1), max_size=4),
    st.lists(st.none() | st.integers(0, 20), max_size=4),
    st.lists(st.none() | st.floats(), max_size=4),
    st.lists(st.none() | st.lists(st.text(max_size=3), max_size=3), max_size=4),
    st.lists(VALUES, max_size=4),
)


def one_by_one(check: Check, values: list[Any], place: str) -> Any:
    try:
        return [check.one(value, f"{place}[{i}]") for i, value in enumerate(values)]
    except ApiError as error:
        return error.status, error.code, error.location


def at_once(check: Check, values: list[Any], place: str) -> Any:
    try:
        return check.column(values, place)
    except ApiError as error:
        return error.status, error.code, error.location


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(CHECKS)), values=ALIKE)
def test_a_column_is_checked_as_its_values_are(name: str, values: list[Any]) -> None:
    found = at_once(CHECKS[name], values, "rows.x")
    assert found == one_by_one(CHECKS[name], values, "rows.x")
    if isinstance(found, list):  # 1 == 1.0 == True, and the pipeline must not see the difference
        assert [type(value) for value in found] == [type(value) for value in one_by_one(CHECKS[name], values, "rows.x")]


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.dictionaries(st.sampled_from([*GOOD, "user", "colour"]), VALUES, max_size=5), max_size=3))
def test_rows_are_answered_as_if_looked_at_one_by_one(rows: list[dict[str, Any]]) -> None:
    sent = requests.sent_of(SCHEMA, with_times=False)
    names = list(rows[0]) if rows else []

    def told(read: Any) -> Any:
        try:
            return read()
        except ApiError as error:
            return error.status

    slow = told(lambda: columns._row_by_row(rows, names, "candidates", sent))
    assert told(lambda: columns._from_rows(rows, "candidates", sent)) == slow


def test_what_is_worked_out_of_a_schema_is_kept_with_it() -> None:
    assert requests.sent_of(SCHEMA, with_times=True) is requests.sent_of(SCHEMA, with_times=True)
    other = SCHEMA.model_copy()
    assert requests.sent_of(other, with_times=True) is not requests.sent_of(SCHEMA, with_times=True)
    assert requests.sent_of(other, with_times=True).mark == requests.sent_of(SCHEMA, with_times=True).mark


def stream(columns: dict[str, Any] | pa.Table, rest: Any = None, **options: Any) -> bytes:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    if rest is not None:
        table = table.replace_schema_metadata({arrow.METADATA: rest if isinstance(rest, bytes) else orjson.dumps(rest)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    found: bytes = sink.getvalue().to_pybytes()
    return found


def refused(columns: Any, rest: Any = None, **options: Any) -> tuple[int, str, str | None]:
    with pytest.raises(ApiError) as error:
        arrow.parse_rank(stream(columns, rest or {"context": {"user": "ann"}}, **options), SCHEMA)
    return error.value.status, error.value.code, error.value.location


def test_every_type_that_a_column_may_have() -> None:
    text = pa.array(["3", "0"])
    for slot in (text, text.cast(pa.large_string()), text.dictionary_encode(), pa.array([3, 0], pa.uint8())):
        for price in (pa.array([1.5, None]), pa.array([1, None], pa.int8()), pa.array([None, None])):
            tags = pa.array([["a"], None], pa.large_list(pa.string()))
            columns = {"slot": slot, "tags": tags, "codes": pa.array([[1], []]), "price": price}
            body = stream(columns, {"context": {"user": 7}, "top_k": 2, "time": 0})
            asked = arrow.parse_rank(body, SCHEMA)
            assert asked.context == {"user": "7"}
            assert (asked.top_k, asked.time) == (2, datetime(1970, 1, 1, tzinfo=UTC))
            found = arrow.ArrowColumns(asked.candidates)
            assert [str(value) for value in found["slot"]] == ["3", "0"]
            assert (found["tags"], found["codes"], found["price"]) == ([["a"], None], [[1], []], price.to_pylist())


def test_times_of_every_type() -> None:
    moment = datetime(2024, 5, 5, 16, 30, tzinfo=UTC)
    columns = {"user": ["ann"], **{name: values[:1] for name, values in GOOD.items()}}
    units: list[Any] = [pa.array([moment], pa.timestamp(unit, "Asia/Tokyo")) for unit in ("s", "ms", "us", "ns")]
    nowhere = pa.array([int(moment.timestamp())], pa.timestamp("s", "Nowhere/Land"))
    for seen in ([moment], [moment.timestamp()], [int(moment.timestamp())], [moment.isoformat()], *units, nowhere):
        rows = arrow.parse_predict(stream({**columns, "seen": seen}), SCHEMA)
        assert rows["seen"].to_pylist() == [moment]
    empty = arrow.parse_predict(stream({**columns, "seen": pa.array([None], pa.timestamp("ns"))}), SCHEMA)
    assert empty["seen"].to_pylist() == [None]


def test_times_outside_the_years_1_to_9999() -> None:
    columns = {"user": ["ann"], **{name: values[:1] for name, values in GOOD.items()}}
    for count, unit, place in ((2**62, "s", "rows.seen"), (2**63 - 1, "us", "rows.seen[0]")):
        with pytest.raises(ApiError) as error:
            arrow.parse_predict(stream({**columns, "seen": pa.array([count], pa.timestamp(unit))}), SCHEMA)
        assert (error.value.status, error.value.code, error.value.location) == (422, "bad_value", place)


@pytest.mark.parametrize(
    ("change", "code", "location"),
    [
        ({"slot": pa.array([3, -1])}, "bad_value", "candidates.slot[1]"),
        ({"slot": pa.array(["3", "x"])}, "bad_value", "candidates.slot[1]"),
        ({"slot": pa.array([3, 10**18])}, "bad_value", "candidates.slot[1]"),
        ({"slot": pa.array([3.0, 1.0])}, "wrong_type", "candidates.slot"),
        ({"slot": pa.array([True, False])}, "wrong_type", "candidates.slot"),
        ({"slot": pa.array([b"3", b"1"])}, "wrong_type", "candidates.slot"),
        ({"slot": pa.array(["3", "1"], pa.string_view())}, "wrong_type", "candidates.slot"),
        ({"slot": pa.array([1, 2], pa.timestamp("s"))}, "wrong_type", "candidates.slot"),
        ({"slot": pa.array([{"a": 1}, None])}, "wrong_type", "candidates.slot"),
        ({"price": pa.array(["1", "2"])}, "wrong_type", "candidates.price"),
        ({"price": pa.array([1.0, math.nan])}, "wrong_type", "candidates.price[1]"),
        ({"price": pa.array([math.inf, 1.0], pa.float16())}, "wrong_type", "candidates.price[0]"),
        ({"tags": pa.array(["a b", "c"])}, "wrong_type", "candidates.tags"),
        ({"tags": pa.array([["a"], ["b", None]])}, "wrong_type", "candidates.tags[1][1]"),
        ({"tags": pa.array([[1.5], []])}, "wrong_type", "candidates.tags"),
        ({"tags": pa.array([[["a"]], []])}, "wrong_type", "candidates.tags"),
        ({"codes": pa.array([[], [4, -2]])}, "bad_value", "candidates.codes[1][1]"),
        ({"codes": pa.array(["1 2", "x"])}, "bad_value", "candidates.codes[1]"),
        ({"colour": pa.array(["red", "red"])}, "unknown_field", "candidates.colour"),
        ({"user": pa.array(["bob", "bob"])}, "field_twice", "candidates.user"),
    ],
)
def test_what_a_column_may_not_hold(change: dict[str, pa.Array], code: str, location: str) -> None:
    assert refused({**GOOD, **change}) == (422, code, location)


def test_what_a_stream_may_not_be() -> None:
    assert refused({name: values for name, values in GOOD.items() if name != "price"})[1:] == (
        "missing_field",
        "candidates.price",
    )
    assert refused(pa.table(GOOD).slice(0, 0)) == (422, "no_rows", "candidates")
    twice = pa.table([pa.array(["1"]), pa.array(["2"])], names=["slot", "slot"])
    assert refused(twice) == (422, "field_twice", "candidates.slot")
    assert refused(GOOD, b"{") == (400, "not_json", None)
    assert refused(GOOD, {"limit": 3}) == (422, "unknown_key", "limit")
    whole = stream(GOOD, {"context": {"user": "ann"}})
    for body in (b"", b"\xff" * 64, whole[: len(whole) // 2], json.dumps(GOOD).encode()):
        with pytest.raises(ApiError) as error:
            arrow.parse_rank(body, SCHEMA)
        assert (error.value.status, error.value.code) == (400, "not_arrow")


def test_items_without_bytes_take_none() -> None:
    nothing = pa.ListArray.from_arrays(pa.array([0, 0, 10**7], pa.int32()), pa.nulls(10**7))
    body = stream({**GOOD, "tags": nothing}, {"context": {"user": "ann"}})
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(ApiError) as error:
            arrow.parse_rank(body, SCHEMA)
    finally:
        pa.set_memory_pool(before)
    assert (error.value.code, error.value.location) == ("wrong_type", "candidates.tags")
    assert pool.max_memory() < 10**6
    hollow = pa.array([[], None], pa.list_(pa.null()))
    taken = arrow.parse_rank(stream({**GOOD, "tags": hollow}, {"context": {"user": "ann"}}), SCHEMA)
    assert taken.candidates["tags"].to_pylist() == [None, None]


def test_damaged_streams_end_as_errors() -> None:
    """Any one byte of a stream changed: read as other values, or refused; never a crash."""
    body = stream({**GOOD, "slot": pa.array(["3", "0"]).dictionary_encode()}, {"context": {"user": "ann"}})
    outcomes = set()
    for place in range(0, len(body), 3):
        broken = bytearray(body)
        broken[place] ^= 0xFF
        try:
            arrow.parse_rank(bytes(broken), SCHEMA)
            outcomes.add(200)
        except ApiError as error:
            outcomes.add(error.status)
    assert {200, 400, 422} <= outcomes


def test_answers_are_streams_with_the_model() -> None:
    model = {"name": "m", "version": "7"}
    table = pa.ipc.open_stream(arrow.ranking_stream([2, 0], [0.5, 0.25], model)).read_all()
    assert table.to_pydict() == {"index": [2, 0], "score": [0.5, 0.25]}
    assert orjson.loads(table.schema.metadata[arrow.METADATA]) == {"model": model}
