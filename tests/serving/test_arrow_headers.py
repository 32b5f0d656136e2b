"""Few bytes of an Arrow stream cannot stand for many: in its columns, its dictionaries and its headers."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from flatbuffers import Builder

from serving.api import arrow
from serving.api.arrow_headers import require_small
from serving.api.bodies import ARROW
from serving.api.errors import ApiError
from tests.serving.running import Service
from tests.serving.test_api_columns import GOOD, SCHEMA, refused, stream
from tests.serving.test_swap_settings import worker

TOO_LARGE = (413, "body_too_large", None)
ASKED = {"context": {"user": "ann"}}


def test_compressed_buffers_are_refused() -> None:
    for codec in ("lz4", "zstd"):
        assert refused({"slot": pa.array(["0" * 10**6] * 20)}, compression=codec) == (415, "compressed", None)
        again = pa.array(["0" * 10**6] * 20).dictionary_encode()
        assert refused({"slot": again}, compression=codec) == (415, "compressed", None)


def test_more_rows_or_batches_than_are_taken_are_not_read() -> None:
    assert refused(pa.table({"slot": pa.nulls(10**9)})) == (413, "too_many_rows", "candidates")
    table = pa.table(GOOD)
    assert refused(pa.concat_tables([table] * 2501)) == (413, "too_many_rows", "candidates")
    (batch,) = table.to_batches()
    with pytest.raises(ApiError) as error:
        arrow.parse_rank(batches([batch, *[batch.slice(0, 0)] * 5000]), SCHEMA)
    assert (error.value.status, error.value.code) == (413, "too_many_rows")


def repeated(text: str, rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int16()), pa.array([text]))


def test_a_dictionarys_text_counts_as_often_as_it_is_meant() -> None:
    """40 columns of 5,000 rows and one text of 4,000 bytes would take 800 MB."""
    nothing = dict.fromkeys(["tags", "codes", "price"], pa.nulls(5000))
    body = stream({**nothing, "slot": repeated("1" * 18, 5000)}, ASKED)
    assert arrow.parse_rank(body, SCHEMA, size=5000 * 18).candidates.num_rows == 5000
    with pytest.raises(ApiError) as error:
        arrow.parse_rank(body, SCHEMA, size=5000 * 18 - 1)
    assert (error.value.status, error.value.code) == (413, "body_too_large")
    both = stream(nothing | {"slot": repeated("3", 5000), "codes": repeated("1 2 " * 500, 5000)}, ASKED)
    assert len(both) < 30_000
    with pytest.raises(ApiError) as error:
        arrow.parse_rank(both, SCHEMA, size=5000 * 2000)
    assert error.value.code == "body_too_large"
    assert refused({"slot": repeated("x" * 10**6, 5000)}) == TOO_LARGE


def test_a_long_text_in_a_dictionary_that_no_row_means_is_of_no_consequence() -> None:
    slot = pa.DictionaryArray.from_arrays(pa.array([0, None], pa.int8()), pa.array(["3", "x" * 10**6]))
    asked = arrow.parse_rank(stream({**GOOD, "slot": slot}, ASKED), SCHEMA)
    assert asked.candidates["slot"].to_pylist() == ["3", None]


def batches(columns: Any, **options: Any) -> bytes:
    """A stream of several batches, its dictionaries as the options say."""
    sink = pa.BufferOutputStream()
    first = columns[0].replace_schema_metadata({arrow.METADATA: b'{"context": {"user": "ann"}}'})
    with pa.ipc.new_stream(sink, first.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in columns:
            writer.write_batch(batch.replace_schema_metadata(first.schema.metadata))
    found: bytes = sink.getvalue().to_pybytes()
    return found


def of_dictionary(index: int, values: list[str]) -> pa.RecordBatch:
    slot = pa.DictionaryArray.from_arrays(pa.array([index], pa.int16()), pa.array(values))
    return pa.record_batch({"slot": slot, **{name: values[:1] for name, values in GOOD.items() if name != "slot"}})


def test_a_dictionary_counts_in_every_batch_that_may_mean_it() -> None:
    values = ["7", *(str(n) * 4 for n in range(1000, 2000))]
    few, many = ([of_dictionary(0, values)] * count for count in (3, 1000))
    body = batches(few)
    assert arrow.parse_rank(body, SCHEMA).candidates["slot"].to_pylist() == ["7"] * 3
    with pytest.raises(ApiError) as error:
        arrow.parse_rank(batches(many), SCHEMA)
    assert (error.value.status, error.value.code) == (413, "body_too_large")


def test_dictionaries_that_grow_are_refused() -> None:
    grown = [of_dictionary(0, ["1"]), of_dictionary(1, ["1", "2"])]
    with pytest.raises(ApiError) as error:
        arrow.parse_rank(batches(grown, emit_dictionary_deltas=True), SCHEMA)
    assert (error.value.status, error.value.code) == (415, "delta")
    assert arrow.parse_rank(batches(grown), SCHEMA).candidates["slot"].to_pylist() == ["1", "2"]


@pytest.mark.parametrize("legacy", [False, True])
def test_rows_are_counted_as_arrow_does(legacy: bool) -> None:
    slot = pa.array(["3", "0"]).dictionary_encode()
    body = stream(pa.concat_tables([pa.table({**GOOD, "slot": slot})] * 7), ASKED, use_legacy_format=legacy)
    require_small(body, "rows", 14, 10**6)
    assert arrow.parse_rank(body, SCHEMA, rows=14).candidates.num_rows == 14
    with pytest.raises(ApiError, match="14 rows; at most 13"):
        require_small(body, "rows", 13, 10**6)


def offsets(builder: Builder, table: int, count: int) -> int:
    """A list that holds one table many times."""
    builder.StartVector(4, count, 4)
    for _ in range(count):
        builder.PrependUOffsetTRelative(table)
    return int(builder.EndVector())


def table(builder: Builder, **parts: tuple[str, int]) -> int:
    builder.StartObject(8)
    for name, (kind, value) in parts.items():
        slot = int(name.removeprefix("p"))
        if kind == "at":
            builder.PrependUOffsetTRelativeSlot(slot, value, 0)
        else:
            builder.PrependUint8Slot(slot, value, 0)
    return int(builder.EndObject())


def pairs(builder: Builder, count: int, size: int) -> int:
    key, value = builder.CreateString("k"), builder.CreateString("v" * size)
    return offsets(builder, table(builder, p0=("at", key), p1=("at", value)), count)


def field(builder: Builder, name: int, kind: int, type_: int, children: int = 0, metadata: int = 0) -> int:
    parts = {"p0": ("at", name), "p2": ("byte", kind), "p3": ("at", type_)}
    parts |= {"p5": ("at", children)} if children else {}
    return table(builder, **parts, **({"p6": ("at", metadata)} if metadata else {}))


def schema(builder: Builder, fields: int, metadata: int = 0) -> int:
    return table(builder, p1=("at", fields), **({"p2": ("at", metadata)} if metadata else {}))


def integer(builder: Builder) -> int:
    builder.StartObject(2)
    builder.PrependInt32Slot(0, 8, 0)
    return int(builder.EndObject())


def message(builder: Builder, header: int, metadata: int = 0) -> bytes:
    builder.StartObject(5)
    builder.PrependInt16Slot(0, 4, 0)
    builder.PrependUint8Slot(1, 1, 0)
    builder.PrependUOffsetTRelativeSlot(2, header, 0)
    if metadata:
        builder.PrependUOffsetTRelativeSlot(4, metadata, 0)
    builder.Finish(builder.EndObject())
    content = bytes(builder.Output())
    content += bytes(-len(content) % 8)
    return struct.pack("<iI", -1, len(content)) + content


def one_field(builder: Builder, **more: int) -> int:
    return offsets(builder, field(builder, builder.CreateString("slot"), 2, integer(builder), **more), 1)


def metadata_of_the_schema(builder: Builder, count: int) -> bytes:
    metadata = pairs(builder, count, 20_000)
    return message(builder, schema(builder, one_field(builder), metadata))


def metadata_of_the_message(builder: Builder, count: int) -> bytes:
    metadata = pairs(builder, count, 20_000)
    return message(builder, schema(builder, one_field(builder)), metadata)


def metadata_of_a_field(builder: Builder, count: int) -> bytes:
    metadata = pairs(builder, count, 20_000)
    return message(builder, schema(builder, one_field(builder, metadata=metadata)))


def a_long_name(builder: Builder, count: int) -> bytes:
    name = builder.CreateString("n" * 20_000)
    return message(builder, schema(builder, offsets(builder, field(builder, name, 2, integer(builder)), count)))


def a_long_zone(builder: Builder, count: int) -> bytes:
    zone = table(builder, p1=("at", builder.CreateString("z" * 5000)))
    at = field(builder, builder.CreateString("slot"), 10, zone)
    return message(builder, schema(builder, offsets(builder, at, count)))


def fields_of_fields(builder: Builder, count: int) -> bytes:
    """Six times six times six and so on, each list the same field over again."""
    name, struct_ = builder.CreateString("slot"), table(builder)
    at = field(builder, name, 2, integer(builder))
    for _ in range(6 if count > 1 else 1):
        at = field(builder, name, 13, struct_, children=offsets(builder, at, 6 if count > 1 else 1))
    room = pairs(builder, 1, 20_000)  # Arrow takes eight tables for each byte of a header
    return message(builder, schema(builder, offsets(builder, at, 1), room))


BOMBS = [
    metadata_of_the_schema,
    metadata_of_the_message,
    metadata_of_a_field,
    a_long_name,
    a_long_zone,
    fields_of_fields,
]


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_header_of_one_thing_many_times_is_refused(bomb: Callable[[Builder, int], bytes]) -> None:
    """Arrow reads each of them, and makes a thousand times its bytes of the longest that would be let in."""
    body = bomb(Builder(1024), 1000)
    assert len(body) < 30_000
    assert len(pa.ipc.open_stream(body).schema.to_string(show_schema_metadata=False)) > 0
    with pytest.raises(ApiError) as error:
        arrow.parse_rank(body, SCHEMA)
    assert (error.value.status, error.value.code, error.value.location) == TOO_LARGE
    with pytest.raises(ApiError) as error:  # once it is let in, for other reasons
        arrow.parse_rank(bomb(Builder(1024), 1), SCHEMA)
    assert error.value.code != "body_too_large"


def test_messages_that_hold_nothing_are_not_looked_at_without_end() -> None:
    nothing = struct.pack("<iIHHi", 12, 8, 4, 4, 4)  # a flatbuffer with an empty table, behind its length
    require_small(nothing * 100, "rows", 5000, 100 * 512)
    with pytest.raises(ApiError) as error:
        require_small(nothing * 100, "rows", 5000, 100 * 512 - 1)
    assert (error.value.status, error.value.code) == (413, "body_too_large")


def test_columns_of_the_same_bytes_count_each() -> None:
    """A batch whose second column points to the offsets and the text of the first."""
    columns = {"slot": pa.array(["3" * 18] * 100), "tags": pa.array(["333"] * 100)}
    body = bytearray(stream(columns, ASKED))
    text, short = (next(n for n in range(0, 600, 8) if struct.unpack_from("<qq", body, n)[1] == b) for b in (1800, 300))
    body[short - 16 : short + 16] = body[text - 16 : text + 16]  # where a buffer lies, and its bytes: offsets, text
    assert pa.ipc.open_stream(bytes(body)).read_all()["tags"].to_pylist() == ["3" * 18] * 100
    assert len(body) < 2 * (1800 + 400)
    for size, code in ((2 * (1800 + 400), "wrong_type"), (2 * (1800 + 400) - 1, "body_too_large")):
        with pytest.raises(ApiError) as error:
            arrow.parse_rank(bytes(body), SCHEMA, size=size)
        assert error.value.code == code


def peak(process: int) -> int:
    """The most bytes that a process has had in memory."""
    (line,) = (line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


@pytest.mark.long
def test_a_server_is_asked_for_gigabytes_and_takes_none(service: Service) -> None:
    """Half a gigabyte of metadata in 120 kB, and 100 MB of text in 41 kB."""
    header = metadata_of_the_schema(Builder(1024), 25_000)
    text = stream({"user": repeated("x" * 10_000, 5000), "item": repeated("1" * 10_000, 5000)})
    good = {"context": {"user": "ann"}, "candidates": {"item": ["1"]}}
    assert httpx.post(f"{service.uri}/rank", json=good).status_code == 200
    before = peak(worker(service))
    for body in (header, text):
        assert len(body) < 250_000
        for route in ("rank", "predict"):
            answer = httpx.post(f"{service.uri}/{route}", content=body, headers={"content-type": ARROW}, timeout=30)
            assert answer.status_code == 413
            error = answer.json()["error"]
            assert (error["code"], error["location"]) == ("body_too_large", None)
            assert error["message"] == "the stream takes more than 16777216 bytes once it is decoded"
    assert peak(worker(service)) - before < 64e6
    assert httpx.post(f"{service.uri}/rank", json=good).status_code == 200
