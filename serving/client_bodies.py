"""What the clients send and read: calls in JSON or Arrow, answers and errors as objects. Legend: N rows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from numbers import Real
from typing import TYPE_CHECKING, Any

import httpx
import orjson

if TYPE_CHECKING:
    import pyarrow as pa

    from features.columns import Rows

JSON, ARROW = "application/json", "application/vnd.apache.arrow.stream"
_METADATA = b"masknet"


@dataclass(frozen=True)
class Model:
    """Which model answered."""

    name: str
    version: str


@dataclass(frozen=True)
class Ranked:
    """A candidate's place in the request, and its score."""

    index: int
    score: float


@dataclass(frozen=True)
class Call:
    """A request, ready to be sent."""

    method: str
    path: str
    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Ranking:
    """The best candidates, best first."""

    model: Model
    items: list[Ranked]
    request_id: str

    @classmethod
    def of(cls, response: httpx.Response) -> "Ranking":
        """From an answer of /rank."""
        request_id = response.headers.get("x-request-id", "")
        if _is_arrow(response):
            table, model = _read(response)
            pairs = zip(table["index"].to_pylist(), table["score"].to_pylist(), strict=True)
            return cls(model, [Ranked(index, score) for index, score in pairs], request_id)
        found = orjson.loads(response.content)
        return cls(Model(**found["model"]), [Ranked(**item) for item in found["items"]], request_id)


@dataclass(frozen=True)
class Scores:
    """The scores [N] of all rows, in their order."""

    model: Model
    scores: list[float]
    request_id: str

    @classmethod
    def of(cls, response: httpx.Response) -> "Scores":
        """From an answer of /predict."""
        request_id = response.headers.get("x-request-id", "")
        if _is_arrow(response):
            table, model = _read(response)
            return cls(model, table["score"].to_pylist(), request_id)
        found = orjson.loads(response.content)
        return cls(Model(**found["model"]), found["scores"], request_id)


class RankingError(Exception):
    """What the service says where it refuses; `retry_after` is in seconds, where it asks for another try."""

    def __init__(
        self, status: int, code: str, message: str, location: str | None, retry_after: float | None, request_id: str
    ) -> None:
        super().__init__(f"{status} {code}{f' at {location}' if location else ''}: {message}")
        self.status, self.code, self.message, self.location = status, code, message, location
        self.retry_after, self.request_id = retry_after, request_id

    @classmethod
    def unless_done(cls, response: httpx.Response) -> httpx.Response:
        """The answer itself, or its error; of what stands between client and service the first 200 letters."""
        if response.is_success:
            return response
        try:
            error = orjson.loads(response.content)["error"]
            code, message, location = error["code"], error["message"], error["location"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            code, message, location = "unknown", response.text[:200], None
        after = response.headers.get("retry-after", "")
        retry_after = float(after) if after.isdecimal() else None
        raise cls(response.status_code, code, message, location, retry_after, response.headers.get("x-request-id", ""))


def rank_call(
    form: str,
    context: Mapping[str, Any],
    candidates: "Rows",
    top_k: int,
    time: datetime | float | str | None,
    request_id: str | None,
) -> Call:
    """A request of /rank; ValueError for infinity. NaN is a missing value, in both forms."""
    for name, value in context.items():
        if _is_infinite(value):
            raise _infinite(f"context.{name}")
    rest: dict[str, Any] = {"context": dict(context), "top_k": top_k}
    if time is not None:
        rest["time"] = time
    return _call("/rank", form, "candidates", candidates, rest, request_id)


def predict_call(form: str, rows: "Rows", request_id: str | None) -> Call:
    """A request of /predict, as `rank_call`."""
    return _call("/predict", form, "rows", rows, {}, request_id)


def _call(path: str, form: str, key: str, rows: "Rows", rest: dict[str, Any], request_id: str | None) -> Call:
    headers = {} if request_id is None else {"x-request-id": request_id}
    if form == "arrow":
        return Call("POST", path, _stream(rows, key, rest), {**headers, "content-type": ARROW, "accept": ARROW})
    body = orjson.dumps({key: _plain(rows, key), **rest}, option=orjson.OPT_SERIALIZE_NUMPY)
    return Call("POST", path, body, {**headers, "content-type": JSON})


def _plain(rows: "Rows", place: str) -> Any:
    """Rows as JSON has them; orjson writes NaN as null, and would write infinity so."""
    if not isinstance(rows, Mapping) and hasattr(rows, "columns"):
        return _table(rows, place).to_pydict()
    for name in rows if isinstance(rows, Mapping) else dict.fromkeys(chain.from_iterable(rows)):
        values = rows[name] if isinstance(rows, Mapping) else [row.get(name) for row in rows]
        first = next((row for row, value in enumerate(values) if _is_infinite(value)), None)
        if first is not None:
            raise _infinite(f"{place}.{name}[{first}]")
    return rows


def _is_infinite(value: Any) -> bool:
    """Of Python's or numpy's floats. Most values are text or numbers of Python's, which are told apart in no time."""
    if isinstance(value, (str, int)):
        return False
    return isinstance(value, (float, Real)) and math.isinf(value)


def _infinite(location: str) -> ValueError:
    return ValueError(f"{location} is infinite, which no field takes")


def _stream(rows: "Rows", place: str, rest: dict[str, Any]) -> bytes:
    import pyarrow as pa

    table = _table(rows, place).replace_schema_metadata({_METADATA: orjson.dumps(rest)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _table(rows: "Rows", place: str) -> "pa.Table":
    """Rows as columns, of which none has NaN or infinity."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from features.columns import as_table

    table = as_table(rows)
    for number, name in enumerate(table.column_names):
        if pa.types.is_floating(table.schema.field(name).type):
            column = table[name]
            first = pc.index(pc.is_inf(column), True).as_py()
            if first >= 0:
                raise _infinite(f"{place}.{name}[{first}]")
            table = table.set_column(number, name, pc.if_else(pc.is_nan(column), None, column))
    return table


def _is_arrow(response: httpx.Response) -> bool:
    return bool(response.headers.get("content-type") == ARROW)


def _read(response: httpx.Response) -> "tuple[pa.Table, Model]":
    import pyarrow as pa

    table = pa.ipc.open_stream(pa.py_buffer(response.content)).read_all()
    return table, Model(**orjson.loads(table.schema.metadata[_METADATA])["model"])
