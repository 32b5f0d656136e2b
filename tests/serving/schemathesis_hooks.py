"""What schemathesis does not know by itself: bodies of Arrow streams, whole and broken ones. It loads this file."""

import io

import pyarrow as pa
import schemathesis
from hypothesis import strategies as st

ARROW = "application/vnd.apache.arrow.stream"


def _stream(items: list[int], user: str) -> bytes:
    table = pa.table({"item": items, "user": [user] * len(items)}, schema=None)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


STREAMS = st.builds(_stream, st.lists(st.integers(-2, 90), max_size=5), st.text("ab", max_size=3))
schemathesis.openapi.media_type(
    ARROW, st.one_of(STREAMS, st.binary(max_size=200), STREAMS.map(lambda body: body[:-20]))
)
