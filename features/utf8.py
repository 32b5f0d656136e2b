"""Text that claims to be UTF-8: Parquet files and Arrow tables hold whatever bytes were put into them."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

RULE = "is not UTF-8"


def text_bytes(text: pa.Array) -> bytes:
    """The bytes of all values (and of neighbours, where the array is a slice)."""
    buffers = text.buffers()
    return buffers[2].to_pybytes() if len(text) and buffers[2] is not None else b""


def sound_text(text: pa.Array) -> tuple[pa.Array, npt.NDArray[np.bool_] | None]:
    """The text with null for what is not UTF-8, and which rows those are (None where all are sound).

    To be called before any other library sees the text: they rely on it.
    """
    if text_bytes(text).isascii():
        return text, None
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        broken_N = np.array([not _decodes(value) for value in text.cast(pa.binary()).to_pylist()], bool)
        return pc.if_else(pa.array(broken_N), pa.scalar(None, pa.string()), text), broken_N
    return text, None


def _decodes(value: bytes | None) -> bool:
    try:
        return value is None or value.decode() is not None
    except UnicodeDecodeError:
        return False


def shown(column: pa.ChunkedArray, rows: npt.NDArray[np.integer], most: int = 80) -> list[str]:
    """Values of a column for a person to read, each cut to `most` characters, whatever bytes they hold."""
    values = column.take(pa.array(rows)).combine_chunks()
    try:
        return [str(value)[:most] for value in values.to_pylist()]
    except UnicodeDecodeError:
        if pa.types.is_list(values.type):
            return ["a list with text that is not UTF-8"] * len(values)
        raw = values.cast(pa.binary()).to_pylist()
        return [str(value if value is None else value.decode(errors="replace"))[:most] for value in raw]
