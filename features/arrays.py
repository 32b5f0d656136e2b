"""Between columns and flat arrays: many text columns as one, lists without their structure, and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.columns import MAX_BYTES
from features.encoders import MISSING
from features.hashing import HashN, hash_text

LengthsN = npt.NDArray[np.int64]
IdsN = npt.NDArray[np.integer]


def texts_at_once(rows: Mapping[str, Any], names: tuple[str, ...]) -> tuple[dict[str, pa.Array], dict[str, HashN]]:
    """Canonical columns and hashes of the fields given as lists of text, converted together for the sake of requests.

    Nothing where any value needs more than that: where it is no text, missing, empty, too long, or has a NUL or a ".0".
    """
    given = [(name, rows[name]) for name in names if isinstance(rows.get(name), list)]
    sizes = {len(values) for _, values in given}
    if len(sizes) != 1 or sizes == {0}:
        return {}, {}
    try:
        data = "\0".join(map("\0".join, (values for _, values in given))).encode()
    except (TypeError, UnicodeEncodeError):
        return {}, {}
    size = sizes.pop()
    stops = np.flatnonzero(np.frombuffer(data, np.uint8) == 0)
    if len(stops) != size * len(given) - 1 or (b"." in data and b".0" in data):
        return {}, {}
    ends = np.append(stops, len(data)) - np.arange(len(stops) + 1)  # without the separators
    offsets = np.append(0, ends).astype(np.int32)
    lengths = np.diff(offsets)
    if lengths.min() == 0 or lengths.max() > MAX_BYTES:
        return {}, {}
    text = pa.StringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(data.replace(b"\0", b"")))
    hash_N = hash_text(text)
    columns = {name: text.slice(index * size, size) for index, (name, _) in enumerate(given)}
    return columns, {name: hash_N[index * size : (index + 1) * size] for index, (name, _) in enumerate(given)}


def flat_values(column: pa.Array) -> tuple[pa.Array, LengthsN | None]:
    """Values without their lists, and the lists' lengths; a column that is no list as it is."""
    if not pa.types.is_list(column.type):
        return column, None
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return pc.list_flatten(column), lengths


def with_missing(ids: IdsN, values: pa.Array) -> IdsN:
    """The ids, with the missing id where the value is null."""
    if values.null_count:
        ids[values.is_null().to_numpy(zero_copy_only=False)] = MISSING
    return ids


def filled(ids: IdsN, lengths: LengthsN) -> tuple[IdsN, LengthsN]:
    """Lists of ids and their lengths [N], where the missing id stands for an empty list."""
    empty_N = lengths == 0
    if not empty_N.any():
        return ids, lengths
    starts = np.cumsum(lengths) - lengths
    return np.insert(ids, starts[empty_N], MISSING), np.where(empty_N, 1, lengths)


def as_column(ids: IdsN, lengths: LengthsN | None, dtype: type[np.integer] = np.int32) -> pa.Array:
    """Ids [N] as `dtype`, or lists of them [N], where missing and empty lists are the missing id alone."""
    if lengths is None:
        return pa.array(ids.astype(dtype, copy=False))
    items, length_N = filled(ids.astype(dtype, copy=False), lengths)
    offsets = np.concatenate([[0], np.cumsum(length_N)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(items))
