"""Numbers of a request's fields as one column: read and scaled in a few calls, whatever the number of fields.

Legend: F fields, N rows, M numbers of several fields.
"""

from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.encoders import LogBucket, Quantile, Scale, scaled
from features.online_columns import Column, UnusualError, arrow
from features.pipeline import FittedField

FloatM = npt.NDArray[np.float64]
ValueN = npt.NDArray[np.float32]
IdN = npt.NDArray[np.int64]

_EXACT = 2.0**53  # doubles hold every whole number below
_NAN = float("nan")


class _Alike(NamedTuple):
    """Fields that follow each other and are scaled by one rule."""

    rule: str
    fields: slice
    shift_F: FloatM
    scale_F: FloatM


class Numbers:
    """Encodes the fields with numbers.

    Args:
        fields: numeric ones.
    """

    def __init__(self, fields: Sequence[FittedField]) -> None:
        values = [(field.name, encoder) for field in fields if isinstance(encoder := field.encoder, Scale)]
        values.sort(key=lambda each: each[1].rule)
        self._alike, start = [], 0
        for rule, group in groupby((encoder for _, encoder in values), lambda encoder: encoder.rule):
            scales = list(group)
            shift_F, scale_F = (np.array([getattr(one, key) for one in scales]) for key in ("shift", "scale"))
            self._alike.append(_Alike(rule, slice(start, start + len(scales)), shift_F, scale_F))
            start += len(scales)
        self._values = [name for name, _ in values]
        self._ids = [(f.name, e) for f in fields if isinstance(e := f.encoder, (Quantile, LogBucket))]
        self._names = [*self._values, *(name for name, _ in self._ids)]

    def encode(self, columns: Mapping[str, Column]) -> tuple[dict[str, ValueN], dict[str, IdN]]:
        """Values by field, NaN where missing, and the ids of the fields that have those.

        Raises:
            UnusualError: a value is no number, or not finite, or a whole number that doubles do not hold.
            InputError: a column is of a type that can never hold numbers.
        """
        if not self._names:
            return {}, {}
        given = [columns[name] for name in self._names]
        number_M = _doubles(given)
        missing_M = np.isnan(number_M)
        gaps = bool(missing_M.any())
        if gaps:
            number_M = np.where(missing_M, 0.0, number_M)
        counts = [len(values) for values in given]
        ends = list(accumulate(counts))
        spans = {name: slice(end - count, end) for name, end, count in zip(self._names, ends, counts, strict=True)}
        value_M = np.empty(sum(counts[: len(self._values)]), np.float32)
        for rule, fields, shift_F, scale_F in self._alike:
            count = counts[fields]
            own = slice(ends[fields.start] - count[0], ends[fields.stop - 1])
            value_M[own] = scaled(rule, number_M[own], np.repeat(shift_F, count), np.repeat(scale_F, count))
        if gaps:
            value_M[missing_M[: len(value_M)]] = np.nan
        found = {name: value_M[spans[name]] for name in self._values}
        ids = {name: encoder.of(number_M[spans[name]], missing_M[spans[name]]) for name, encoder in self._ids}
        return found, ids


def _doubles(columns: Sequence[Column]) -> FloatM:
    """All columns' numbers behind each other, NaN where missing."""
    buffer = array("d")
    for values in columns:
        if isinstance(values, list):
            _append(buffer, values)
        else:
            buffer.frombytes(_of_arrow(values).tobytes())
    found = np.frombuffer(buffer, np.float64)
    if (np.abs(found) >= _EXACT).any():
        lists = chain.from_iterable(values for values in columns if isinstance(values, list))
        if np.isinf(found).any() or any(type(value) is int and abs(value) >= _EXACT for value in lists):
            raise UnusualError  # the general way knows what becomes of whole numbers that doubles do not hold
    return found


def _append(buffer: "array[float]", values: list[Any]) -> None:
    try:
        try:
            buffer.fromlist(values)
        except TypeError:
            if bool in map(type, values):
                raise
            buffer.fromlist([_NAN if value is None else value for value in values])
    except (TypeError, OverflowError):
        raise UnusualError from None


def _of_arrow(values: Column) -> FloatM:
    column = arrow(values, "")
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise UnusualError
    number_N: FloatM = pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return number_N
