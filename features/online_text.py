"""Text of a request's fields as one column: cleaned and hashed in a few calls, whatever the number of fields.

Legend: M items of a field (one a row, or as many as its lists hold), N rows.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.columns import as_strings, canonical, clean_text, kept_items
from features.crosses import Part
from features.encoders import whole_numbers
from features.fields import CategoricalField, ListField
from features.hashing import HashN, hash_text
from features.online_columns import Column, UnusualError, arrow
from features.short_hashes import LONGEST, hash_short

LengthsN = npt.NDArray[np.int64]

_LARGEST_TEXT = 2**31 - 1  # bytes of a pa.StringArray
_MOST_DIGITS = 18


class Texts:
    """Items of several fields with text, hashed together.

    Args:
        columns: of each field; lists of text, whole numbers and None, or Arrow arrays.
        specs: of each field.
        kinds: the kind of each field's encoder.

    Raises:
        UnusualError: a value is no text, or not good.
        InputError: a column is of a type that can never hold such a field.
    """

    def __init__(
        self, columns: Sequence[Column], specs: Sequence[CategoricalField | ListField], kinds: Sequence[str]
    ) -> None:
        given = [_items(*each) for each in zip(columns, specs, kinds, strict=True)]
        lists_first = sorted(range(len(given)), key=lambda place: not isinstance(given[place][0], list))
        pieces = [given[place][0] for place in lists_first]
        self._specs, self._lengths = specs, [lengths for _, lengths in given]
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        spans = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        self._spans = [span for _, span in sorted(zip(lists_first, spans, strict=True))]
        self._text: pa.Array | None = None
        lists = [piece for piece in pieces if isinstance(piece, list)]
        self._joined = _joined(lists)
        if len(lists) == len(pieces) and self._joined.is_plain:
            self.hash_M = hash_short(*self._joined)
            self._missing_M = self._joined.length_M == 0
        else:
            self._text = _cleaned(pa.concat_arrays([self._joined.array(), *pieces[len(lists) :]]))
            self.hash_M = _hashed(self._text)
            self._missing_M = self._text.is_null().to_numpy(zero_copy_only=False)
        self.any_missing = bool(self._missing_M.any())

    def part(self, place: int) -> Part:
        """Hashes of a field's items, by its place in the columns; of lists only those that the field keeps."""
        span = self._spans[place]
        hash_M, missing_M = self.hash_M[span], self._missing_M[span]
        lengths_N, spec = self._lengths[place], self._specs[place]
        if lengths_N is None or not isinstance(spec, ListField):
            return Part(hash_M, missing_M)
        kept_M, lengths_N = kept_items(~missing_M if self.any_missing else None, lengths_N, spec)
        if kept_M is not None:
            hash_M, missing_M = hash_M[kept_M], missing_M[kept_M]
        return Part(hash_M, missing_M, lengths_N)

    def whole_numbers(self, places: Sequence[int]) -> list[npt.NDArray[np.int64]]:
        """Items of fields that hold whole numbers of 0 or more, −1 where missing; kept as in `part`.

        Raises:
            UnusualError: there are others.
        """
        everything = _cleaned(self._joined.array()) if self._text is None else self._text
        spans = [self._spans[place] for place in places]
        text = pa.concat_arrays([everything.slice(span.start, span.stop - span.start) for span in spans])
        longest = pc.max(pc.binary_length(text)).as_py() or 0
        if longest > _MOST_DIGITS or not pc.all(pc.ascii_is_decimal(text), min_count=0).as_py():
            raise UnusualError
        numbers_M = whole_numbers(text)
        found = np.split(numbers_M, np.cumsum([span.stop - span.start for span in spans])[:-1])
        return [self._kept(place, numbers) for place, numbers in zip(places, found, strict=True)]

    def _kept(self, place: int, numbers_M: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        lengths_N, spec = self._lengths[place], self._specs[place]
        if lengths_N is None or not isinstance(spec, ListField):
            return numbers_M
        kept_M, _ = kept_items(numbers_M >= 0 if self.any_missing else None, lengths_N, spec)
        return numbers_M if kept_M is None else numbers_M[kept_M]


def _items(values: Column, spec: CategoricalField | ListField, kind: str) -> tuple[list[Any] | pa.Array, Any]:
    """A field's values, and for lists how many of them each row has."""
    if not isinstance(spec, ListField):
        return (values, None) if isinstance(values, list) else (_as_text(arrow(values, spec.name), spec.name), None)
    if isinstance(values, list):
        kinds = set(map(type, values))
        if not kinds <= {list, type(None)}:
            raise UnusualError
        lists = [items or () for items in values] if type(None) in kinds else values
        return list(chain.from_iterable(lists)), np.fromiter(map(len, lists), np.int64, len(lists))
    column = arrow(values, spec.name)
    if not pa.types.is_list(column.type):  # text with separators, as files have it
        found = canonical(pa.table({spec.name: column}), spec, kind)
        if found.bad_N is not None:
            raise UnusualError
        column = found.values
    lengths_N = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return _as_text(pc.list_flatten(column), spec.name), lengths_N


def _as_text(column: pa.Array, name: str) -> pa.Array:
    if pa.types.is_string(column.type):
        return column
    found = as_strings(column, name)
    if found.bad_N is not None:
        raise UnusualError
    return found.values


class _Joined(NamedTuple):
    """Values in one piece of UTF-8, where each begins, and how many bytes it has."""

    data: bytes
    start_M: LengthsN
    length_M: LengthsN

    @property
    def is_plain(self) -> bool:
        """Whether the values can be hashed as they are, the empty ones being missing."""
        return bool(self.length_M.max(initial=0) <= LONGEST) and not (b"." in self.data and b".0" in self.data)

    def array(self) -> pa.Array:
        """The same as a column."""
        offsets = np.append(0, np.cumsum(self.length_M)).astype(np.int32)
        text = self.data.translate(None, b"\0")
        return pa.StringArray.from_buffers(len(self.length_M), pa.py_buffer(offsets), pa.py_buffer(text))


def _joined(lists: list[list[Any]]) -> _Joined:
    """Lists of text, whole numbers and None, with a NUL behind each: one join and one scan of bytes for them all."""
    lists = [values for values in lists if values]
    try:
        try:
            data = "\0".join(map("\0".join, lists)).encode()
        except TypeError:
            data = "\0".join("\0".join(_texts(values)) for values in lists).encode()
    except UnicodeEncodeError:
        raise UnusualError from None
    count = sum(map(len, lists))
    end_M = np.append(np.flatnonzero(np.frombuffer(data, np.uint8) == 0), [len(data)][:count])
    if len(end_M) != count or len(data) > _LARGEST_TEXT:  # a value holds a NUL
        raise UnusualError
    start_M = np.append([0][:count], end_M[:-1] + 1)
    return _Joined(data, start_M, end_M - start_M)


def _cleaned(text: pa.Array) -> pa.Array:
    if not len(text):
        return text
    found = clean_text(text)
    if found.bad_N is not None:
        raise UnusualError
    return found.values


def _hashed(text: pa.Array) -> HashN:
    """Hashes of a column, whichever way is the shorter."""
    if (pc.max(pc.binary_length(text)).as_py() or 0) > LONGEST:
        return hash_text(text)
    _, offsets, data = text.buffers()
    if data is None:
        return np.zeros(len(text), np.uint64)
    offset_M = np.frombuffer(offsets, np.int32)[text.offset :][: len(text) + 1].astype(np.int64)
    length_M = np.diff(offset_M)
    if text.null_count:
        length_M[text.is_null().to_numpy(zero_copy_only=False)] = 0
    return hash_short(data.to_pybytes(), offset_M[:-1], length_M)


def _texts(values: list[Any]) -> list[str]:
    """Text of text, whole numbers and None, which is empty text here."""
    if not set(map(type, values)) <= {str, int, type(None)}:
        raise UnusualError
    return [value if type(value) is str else "" if value is None else str(value) for value in values]
