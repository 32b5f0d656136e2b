"""Requests and answers as Arrow IPC streams: the candidates or rows are the stream, the rest is JSON in its metadata.

The metadata of the stream's schema holds, under `masknet`, {"context", "top_k", "time"} as /rank takes them in JSON.
Columns are checked as those of JSON are, with the same errors. Nothing is decoded before its size is known: compressed
bodies, and types in which few bytes can stand for many values, are refused.

Legend: N rows, K ranked candidates.
"""

import struct
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from features.schema import Schema
from serving.api.arrow_columns import checked_column, sized
from serving.api.columns import no_rows, require_at_most
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

METADATA = b"masknet"
# Fields of Arrow's RecordBatch (the first two), Message and DictionaryBatch.
_LENGTH, _COMPRESSION, _HEADER, _DATA = 0, 3, 2, 1


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


def parse_rank(body: bytes, schema: Schema, *, optional: Collection[str] = (), rows: int = MAX_ROWS) -> RankRequest:
    """Check a /rank body; ApiError says what is wrong and where, as in JSON (see serving.api.requests)."""
    stream = _open(body)
    data = _metadata(stream, {"context", "top_k", "time"})
    sent = sent_of(schema, with_times=False)
    context = context_of(data, sent)
    candidates = _columns(body, stream, "candidates", sent, rows)
    require_fields(candidates.column_names, "candidates", sent, context, optional)
    return RankRequest(context, candidates, top_k_of(data), time_of(data))


def parse_predict(body: bytes, schema: Schema, *, optional: Collection[str] = (), rows: int = MAX_ROWS) -> pa.Table:
    """Check a /predict body; ApiError says what is wrong and where."""
    stream = _open(body)
    _metadata(stream, set())
    sent = sent_of(schema, with_times=True)
    table = _columns(body, stream, "rows", sent, rows)
    require_fields(table.column_names, "rows", sent, {}, optional)
    return table


def scores_stream(score_N: ScoreN, model: Mapping[str, str]) -> bytes:
    """An answer of /predict: one column `score`, and which model in the metadata."""
    return _written({"score": pa.array(score_N)}, model)


def ranking_stream(index_K: Sequence[int], score_K: Sequence[float], model: Mapping[str, str]) -> bytes:
    """An answer of /rank: columns `index` and `score`, best first, and which model in the metadata."""
    return _written({"index": pa.array(index_K, pa.int32()), "score": pa.array(np.asarray(score_K, np.float32))}, model)


def _written(columns: dict[str, pa.Array], model: Mapping[str, str]) -> bytes:
    batch = pa.record_batch(columns, metadata={METADATA: orjson.dumps({"model": model})})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _open(body: bytes) -> pa.RecordBatchStreamReader:
    try:
        stream = pa.ipc.open_stream(pa.py_buffer(body))
        _ = stream.schema.names  # raises where one is no Unicode
        return stream
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _not_arrow(error) from None


def _not_arrow(error: Exception) -> ApiError:
    return ApiError(400, "not_arrow", f"the body is no Arrow IPC stream: {str(error).splitlines()[0][:200]}")


def _metadata(stream: pa.RecordBatchStreamReader, allowed: set[str]) -> dict[str, Any]:
    return object_of((stream.schema.metadata or {}).get(METADATA, b"{}"), allowed)


def _columns(body: bytes, stream: pa.RecordBatchStreamReader, place: str, sent: Sent, limit: int) -> pa.Table:
    """The stream's table of checked columns, decoded after its size, names and types are found right."""
    names = stream.schema.names
    for name in names:
        sent.known(name, f"{place}.{name}")
        if names.count(name) > 1:
            raise ApiError(422, "field_twice", f"column {name!r} is there twice", f"{place}.{name}")
        sized(stream.schema.field(name).type, f"{place}.{name}")
    try:
        require_at_most(limit, _rows_of(body), place)
        table = stream.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:
        raise _not_arrow(error) from None
    if table.num_rows == 0 or not names:
        raise no_rows(place)
    columns = {name: checked_column(table[name], sent.checks[name], f"{place}.{name}") for name in names}
    return pa.table(columns)


def _rows_of(body: bytes) -> int:
    """Rows of all batches by their headers; ApiError where a batch or a dictionary is compressed."""
    rows = 0
    for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(body)):
        if message.type == "schema":
            continue
        header = message.metadata.to_pybytes()
        batch = _field(header, _at(header, 0), _HEADER)
        if message.type == "dictionary":
            batch = _field(header, _at(header, batch or 0), _DATA)
        table = _at(header, batch or 0)
        if _field(header, table, _COMPRESSION) is not None:
            raise ApiError(415, "compressed", "the stream's buffers are compressed; send them as they are")
        length = _field(header, table, _LENGTH)
        if message.type == "record batch" and length is not None:
            rows += struct.unpack_from("<q", header, length)[0]
    return rows


def _at(buffer: bytes, position: int) -> int:
    """Where an offset in a flatbuffer points to."""
    return int(position + struct.unpack_from("<I", buffer, position)[0])


def _field(buffer: bytes, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer's table lies; None where it is left out."""
    vtable = table - struct.unpack_from("<i", buffer, table)[0]
    place = 4 + 2 * number
    if place >= struct.unpack_from("<H", buffer, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", buffer, vtable + place)[0]
    return table + offset if offset else None
