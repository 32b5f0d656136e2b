"""Columns of a request as they come, and those of numbers as doubles."""

from array import array
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.columns import as_table, plain

Column: TypeAlias = Sequence[Any] | pa.Array | pa.ChunkedArray
FloatN = npt.NDArray[np.float64]

_EXACT = 2.0**53  # doubles hold every whole number below


class UnusualError(Exception):
    """Values that only the general way can encode, or say what is wrong with."""


def arrow(values: Column, name: str) -> pa.Array:
    """A column as one plain array; InputError where its values do not go together."""
    if isinstance(values, pa.Array):
        values = pa.chunked_array([values])
    return plain(values if isinstance(values, pa.ChunkedArray) else as_table({name: values})[name])


def numbers(values: Column) -> FloatN:
    """Doubles, NaN where missing.

    Raises:
        UnusualError: a value is no number, or not finite.
    """
    number_N = _numbers_of_list(values) if isinstance(values, list) else _numbers_of_arrow(values)
    if np.isinf(number_N).any():
        raise UnusualError
    return number_N


def _numbers_of_list(values: list[Any]) -> FloatN:
    try:
        number_N = np.frombuffer(array("d", values), np.float64)
    except TypeError:
        if not set(map(type, values)) <= {float, int, type(None)}:
            raise UnusualError from None
        number_N = np.array(values, np.float64)
    except OverflowError:
        raise UnusualError from None
    if not (np.abs(number_N) < _EXACT).all() and any(type(v) is int and abs(v) >= _EXACT for v in values):
        raise UnusualError  # the general way knows what becomes of whole numbers that doubles do not hold
    return number_N


def _numbers_of_arrow(values: Column) -> FloatN:
    column = arrow(values, "")
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise UnusualError
    number_N: FloatN = pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return number_N
