"""Columns of a request as they come."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import pyarrow as pa

from features.columns import as_table, plain

Column: TypeAlias = Sequence[Any] | pa.Array | pa.ChunkedArray


class UnusualError(Exception):
    """Values that only the general way can encode, or say what is wrong with."""


def arrow(values: Column, name: str) -> pa.Array:
    """A column as one plain array; InputError where its values do not go together."""
    if isinstance(values, pa.Array):
        values = pa.chunked_array([values])
    return plain(values if isinstance(values, pa.ChunkedArray) else as_table({name: values})[name])
