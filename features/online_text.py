"""Text of a request's fields as one column: cleaned and hashed in a few calls, whatever the number of fields.

Legend: M items of a field (one a row, or as many as its lists hold), N rows.
"""

from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate, chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.columns import Canonical, as_strings, canonical, clean_text, kept_items
from features.crosses import Part
from features.encoders import whole_numbers
from features.fields import CategoricalField, ListField
from features.hashing import hash_text
from features.online_columns import Column, UnusualError, arrow
from features.short_hashes import LONGEST, hash_short
from features.utf8 import sound_text, text_bytes

LengthsN = npt.NDArray[np.int64]
T = TypeVar("T", bound=np.generic)

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
        self.order = sorted(range(len(given)), key=lambda place: not isinstance(given[place][0], list))  # lists first
        pieces = [given[place][0] for place in self.order]
        self.counts = [len(piece) for piece in pieces]
        self._specs, self._lengths = specs, [lengths for _, lengths in given]
        ends = list(accumulate(self.counts))
        spans = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        self._spans = dict(zip(self.order, spans, strict=True))
        lists = [piece for piece in pieces if isinstance(piece, list)]
        self._joined = _joined(lists)
        self._text: pa.Array | None = None
        if len(lists) < len(pieces):
            self._text = pa.concat_arrays([self._joined.array(), *pieces[len(lists) :]])
            self._joined = _laid_out(self._text)
        if self._joined.is_plain and (self._text is None or _is_sound(self._text)):
            self.hash_M = hash_short(*self._joined)
            self.missing_M = self._joined.length_M == 0
        else:
            self._text = self._clean()
            short = (pc.max(pc.binary_length(self._text)).as_py() or 0) <= LONGEST
            self.hash_M = hash_short(*_laid_out(self._text)) if short else hash_text(self._text)
            self.missing_M = self._text.is_null().to_numpy(zero_copy_only=False)
        self.any_missing = bool(self.missing_M.any())
        self._kept = {
            place: self._kept_items(place) for place, lengths in enumerate(self._lengths) if lengths is not None
        }

    def of(self, place: int, item_M: npt.NDArray[T]) -> npt.NDArray[T]:
        """A field's own of what there is for all items; of lists only for those that the field keeps."""
        own_M = item_M[self._spans[place]]
        kept_M = self._kept[place][0] if place in self._kept else None
        return own_M if kept_M is None else own_M[kept_M]

    def part(self, place: int) -> Part:
        """Hashes of a field's items, by its place in the columns."""
        lengths_N = self._kept[place][1] if place in self._kept else None
        return Part(self.of(place, self.hash_M), self.of(place, self.missing_M), lengths_N)

    def _clean(self) -> pa.Array:
        text = self._joined.array() if self._text is None else self._text
        found = clean_text(text) if len(text) else Canonical(text)
        if found.bad_N is not None:
            raise UnusualError
        return found.values

    def _kept_items(self, place: int) -> tuple[npt.NDArray[np.bool_] | None, LengthsN]:
        spec = self._specs[place]
        assert isinstance(spec, ListField)
        return kept_items(~self.missing_M[self._spans[place]] if self.any_missing else None, self._lengths[place], spec)

    def whole_numbers(self, places: Sequence[int]) -> list[npt.NDArray[np.int64]]:
        """Items of fields that hold whole numbers of 0 or more, −1 where missing; kept as in `part`.

        Raises:
            UnusualError: there are others.
        """
        everything = self._clean()
        spans = [self._spans[place] for place in places]
        text = pa.concat_arrays([everything.slice(span.start, span.stop - span.start) for span in spans])
        longest = pc.max(pc.binary_length(text)).as_py() or 0
        if longest > _MOST_DIGITS or not pc.all(pc.ascii_is_decimal(text), min_count=0).as_py():
            raise UnusualError
        numbers_M = whole_numbers(text)
        found = np.split(numbers_M, np.cumsum([span.stop - span.start for span in spans])[:-1])
        kept = [self._kept.get(place, (None,))[0] for place in places]
        return [number_M if kept_M is None else number_M[kept_M] for number_M, kept_M in zip(found, kept, strict=True)]


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
        data = "\0".join(map(_of_one, lists)).encode()
    except UnicodeEncodeError:
        raise UnusualError from None
    count = sum(map(len, lists))
    end_M = np.append(np.flatnonzero(np.frombuffer(data, np.uint8) == 0), [len(data)][:count])
    if len(end_M) != count or len(data) > _LARGEST_TEXT:  # a value holds a NUL
        raise UnusualError
    start_M = np.append([0][:count], end_M[:-1] + 1)
    return _Joined(data, start_M, end_M - start_M)


def _laid_out(text: pa.Array) -> _Joined:
    """A column's values, null as empty ones."""
    _, offsets, _ = text.buffers()
    if not len(text) or offsets is None:
        return _Joined(b"", np.zeros(len(text), np.int64), np.zeros(len(text), np.int64))
    offset_M = np.frombuffer(offsets, np.int32)[text.offset :][: len(text) + 1].astype(np.int64)
    length_M = np.diff(offset_M)
    if text.null_count:
        length_M[text.is_null().to_numpy(zero_copy_only=False)] = 0
    return _Joined(text_bytes(text), offset_M[:-1], length_M)


def _is_sound(text: pa.Array) -> bool:
    return b"\0" not in text_bytes(text) and sound_text(text)[1] is None


def _of_one(values: list[Any]) -> str:
    """Joined text of text, whole numbers and None, which is empty text here."""
    for given in (lambda: values, lambda: ["" if value is None else value for value in values]):
        with suppress(TypeError):  # most fields hold text alone, most others nothing but text and None
            return "\0".join(given())
    if not set(map(type, values)) <= {str, int, type(None)}:
        raise UnusualError
    return "\0".join(["" if value is None else str(value) for value in values])
