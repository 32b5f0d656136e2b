"""Requests and answers as Arrow IPC streams: the candidates or rows are the stream, the rest is JSON in its metadata.

The metadata of the stream's schema holds, under `masknet`, {"context", "top_k", "time"} as /rank takes them in JSON.
Columns are checked as those of JSON are, with the same errors. Nothing is decoded before its size is known (see
serving.api.arrow_headers): compressed bodies, and types in which few bytes can stand for many values, are refused.

Legend: N rows, K ranked candidates.
"""

import struct
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from features.schema import Schema
from serving.api.arrow_columns import checked_column, decoded_bytes, joined, sized
from serving.api.arrow_headers import Room, require_small
from serving.api.columns import no_rows
from serving.api.errors import ApiError
from serving.api.requests import (
    MAX_ROWS,
    RankRequest,
    context_of,
    object_of,
    require_fields,
    sent_of,
    time_of,
    top_k_of,
)
from serving.api.values import Sent
from serving.calibration import ScoreN
from serving.settings import Limits

METADATA = b"masknet"
MAX_BYTES = Limits().body_bytes
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream (Arrow columnar format, "IPC streaming format")


class ArrowColumns(MutableMapping[str, Sequence[Any]]):
    """A table's columns as Python lists, made when they are asked for; what is set becomes a column of `table`."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self.table.column_names:
            raise KeyError(name)
        values: list[Any] = self.table[name].to_pylist()
        return values

    def __setitem__(self, name: str, values: Sequence[Any]) -> None:
        if name in self.table.column_names:
            del self[name]
        self.table = self.table.append_column(name, pa.array(values))

    def __delitem__(self, name: str) -> None:
        self.table = self.table.drop_columns(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.table.column_names)

    def __len__(self) -> int:
        return int(self.table.num_columns)


def parse_rank(
    body: bytes, schema: Schema, *, optional: Collection[str] = (), rows: int = MAX_ROWS, size: int = MAX_BYTES
) -> RankRequest:
    """Check a /rank body; ApiError says what is wrong and where, as in JSON (see serving.api.requests).

    `size` is the most bytes that the stream may take once it is decoded, if it was not sent with more; others are 413.
    """
    size = max(size, len(body))
    stream = _open(body, "candidates", rows, size)
    data = _metadata(stream, {"context", "top_k", "time"})
    sent = sent_of(schema, with_times=False)
    context = context_of(data, sent)
    candidates = _columns(stream, "candidates", sent, Room(size), len(body))
    require_fields(candidates.column_names, "candidates", sent, context, optional)
    return RankRequest(context, candidates, top_k_of(data), time_of(data))


def parse_predict(
    body: bytes, schema: Schema, *, optional: Collection[str] = (), rows: int = MAX_ROWS, size: int = MAX_BYTES
) -> pa.Table:
    """Check a /predict body; ApiError says what is wrong and where; see `parse_rank`."""
    size = max(size, len(body))
    stream = _open(body, "rows", rows, size)
    _metadata(stream, set())
    sent = sent_of(schema, with_times=True)
    table = _columns(stream, "rows", sent, Room(size), len(body))
    require_fields(table.column_names, "rows", sent, {}, optional)
    return table


def scores_stream(score_N: ScoreN, model: Mapping[str, str]) -> bytes:
    """An answer of /predict: one column `score`, and which model in the metadata."""
    return _written([pa.array(score_N)], ("score",), model)


def ranking_stream(index_K: Sequence[int], score_K: Sequence[float], model: Mapping[str, str]) -> bytes:
    """An answer of /rank: columns `index` and `score`, best first, and which model in the metadata."""
    arrays = [pa.array(np.asarray(index_K, np.int32)), pa.array(np.asarray(score_K, np.float32))]
    return _written(arrays, ("index", "score"), model)


def _written(arrays: list[pa.Array], names: tuple[str, ...], model: Mapping[str, str]) -> bytes:
    head, schema = _head(tuple(array.type for array in arrays), names, *model.items())
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    return head + batch.serialize().to_pybytes() + _END


@lru_cache(maxsize=16)  # of every answer of a model the same; making it is half of the work
def _head(types: tuple[pa.DataType, ...], names: tuple[str, ...], *model: tuple[str, str]) -> tuple[bytes, pa.Schema]:
    """A stream's first message, and the schema that it holds."""
    metadata = {METADATA: orjson.dumps({"model": dict(model)})}
    schema = pa.schema(list(zip(names, types, strict=True)), metadata)
    return schema.serialize().to_pybytes(), schema


def _open(body: bytes, place: str, rows: int, size: int) -> pa.RecordBatchStreamReader:
    try:
        require_small(body, place, rows, size)
        stream = pa.ipc.open_stream(pa.py_buffer(body))
        _ = stream.schema.names  # raises where one is no Unicode
        return stream
    except (pa.ArrowException, OSError, ValueError, IndexError, struct.error) as error:
        raise _not_arrow(error) from None


def _not_arrow(error: Exception) -> ApiError:
    return ApiError(400, "not_arrow", f"the body is no Arrow IPC stream: {str(error).splitlines()[0][:200]}")


def _metadata(stream: pa.RecordBatchStreamReader, allowed: set[str]) -> dict[str, Any]:
    return object_of((stream.schema.metadata or {}).get(METADATA, b"{}"), allowed)


def _columns(stream: pa.RecordBatchStreamReader, place: str, sent: Sent, room: Room, sent_bytes: int) -> pa.Table:
    """The stream's table of checked columns, decoded after its size, names and types are found right."""
    names = stream.schema.names
    for name in names:
        sent.known(name, f"{place}.{name}")
        if names.count(name) > 1:
            raise ApiError(422, "field_twice", f"column {name!r} is there twice", f"{place}.{name}")
        sized(stream.schema.field(name).type, f"{place}.{name}")
    try:
        table = stream.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _not_arrow(error) from None
    if table.num_rows == 0 or not names:
        raise no_rows(place)
    if not room.holds(len(names) * sent_bytes):  # columns may be made of the same bytes
        room.take(sum(column.nbytes for column in table.columns))
    arrays = {name: joined(table[name]) for name in names}
    room.take(sum(map(decoded_bytes, arrays.values())))
    return pa.table(
        {name: checked_column(array, sent.checks[name], f"{place}.{name}") for name, array in arrays.items()}
    )
