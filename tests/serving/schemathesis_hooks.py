"""What schemathesis does not know by itself, for the fields of tests.serving.every_kind. It loads this file.

Bodies of Arrow streams, whole and broken ones; and, where COMPLETE is set, the rules that OpenAPI cannot say: a field
comes once, in the context or per row, columns are of one length, and text that is to be a time is one.
"""

import io
import os
from typing import Any

import pyarrow as pa
import schemathesis
from hypothesis import strategies as st

ARROW = "application/vnd.apache.arrow.stream"
TIME = "2024-05-05T18:30:00+02:00"
FIELDS = ("price", "liked", "user", "item", "slot", "codes", "genres", "age", "clicks", "income", "share")
NUMERIC = ("price", "age", "clicks", "income", "share")
EXTREMES = [1e19, -1e25, 1e39, 1.7e308, -1.7e308, 5e-324, 2**63, 10**18, -(10**18)]
TEXT = st.none() | st.text("ab|7", max_size=3)
NUMBER = st.none() | st.floats(allow_nan=False, allow_infinity=False)
COLUMNS: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    **dict.fromkeys(("price", "age", "income", "share"), (pa.float64(), NUMBER)),
    **dict.fromkeys(("user", "item", "genres"), (pa.string(), TEXT)),
    "clicks": (pa.int64(), st.none() | st.integers(-(2**63), 2**63 - 1)),
    "slot": (pa.int32(), st.none() | st.integers(-2, 2**31 - 1)),
    "codes": (pa.list_(pa.int64()), st.none() | st.lists(st.integers(0, 10), max_size=3)),
    "liked": (pa.large_list(pa.string()), st.none() | st.lists(st.text("ab", max_size=2), max_size=3)),
}


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Tables with every field; with times in some, which only /predict takes."""
    rows = draw(st.integers(0, 4))
    columns = {name: pa.array(draw(_lists(one, rows)), kind) for name, (kind, one) in COLUMNS.items()}
    if draw(st.booleans()):
        columns["seen"] = pa.array(draw(_lists(st.integers(0, 2**33), rows)), pa.int64())
    sink = io.BytesIO()
    table = pa.table(columns)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _lists(one: st.SearchStrategy[Any], rows: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(one, min_size=rows, max_size=rows)


def complete(context: schemathesis.HookContext, body: Any) -> st.SearchStrategy[Any]:
    """The body's own values with what they lack, and now and then a number that hardly anybody sends."""
    key = next((key for key in ("candidates", "rows") if isinstance(body, dict) and key in body), None)
    if key is None:
        return st.just(body)
    once = body.get("context", {}) if key == "candidates" else {}
    names = [*(name for name in FIELDS if name not in once), *(["seen"] if key == "rows" else [])]
    rows = body[key]
    if isinstance(rows, dict):
        count = max([1, *(len(rows[name]) for name in names if name in rows)])
        rows = {name: [*rows.get(name, []), *[None] * count][:count] for name in names}
        rows |= {"seen": [_time(value) for value in rows["seen"]]} if "seen" in rows else {}
    else:
        rows = [{name: row.get(name) for name in names} for row in rows]
        rows = [{**row, "seen": _time(row["seen"])} if "seen" in row else row for row in rows]
    body = {**body, key: rows} | ({"time": _time(body["time"])} if "time" in body else {})
    odd = st.tuples(st.sampled_from(NUMERIC), st.sampled_from(EXTREMES))
    return st.just(body) | odd.map(lambda pair: _with(body, key, *pair))


def _time(value: Any) -> Any:
    return TIME if isinstance(value, str) else value


def _with(body: dict[str, Any], key: str, name: str, number: float) -> dict[str, Any]:
    rows = body[key]
    if name not in (rows if isinstance(rows, dict) else rows[0]):
        return {**body, "context": {**body["context"], name: number}}
    if isinstance(rows, dict):
        return {**body, key: {**rows, name: [number, *rows[name][1:]]}}
    return {**body, key: [{**rows[0], name: number}, *rows[1:]]}


STREAMS = streams()
if os.environ.get("COMPLETE"):
    schemathesis.hook("flatmap_body")(complete)
else:
    STREAMS |= st.binary(max_size=200) | STREAMS.map(lambda body: body[:-20])
schemathesis.openapi.media_type(ARROW, STREAMS)
