"""What an Arrow IPC stream takes in memory, by its headers, before Arrow reads them.

Headers are flatbuffers: a thousand fields, or pairs of metadata, may be the same bytes, which Arrow copies for each. A
dictionary stands for itself once more in every batch after the first, since each is checked and joined by itself.
"""

from collections.abc import Iterator
from struct import Struct

from serving.api.columns import require_at_most
from serving.api.errors import ApiError

_TABLE = 512  # bytes that Arrow makes of a field, of a pair of metadata or of a message, beside their text
# Parts of tables in Arrow's format/Message.fbs and Schema.fbs: Message, RecordBatch, DictionaryBatch, Schema, Field.
_KIND, _HEADER, _BODY_LENGTH, _MESSAGE_PAIRS = 1, 2, 3, 4
_LENGTH, _COMPRESSION = 0, 3
_ID, _DATA, _IS_DELTA = 0, 1, 2
_FIELDS, _SCHEMA_PAIRS = 1, 2
_NAME, _TYPE_KIND, _TYPE, _CHILDREN, _FIELD_PAIRS = 0, 2, 3, 5, 6
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3  # kinds of messages
_TIMESTAMP, _UNION = 10, 14  # types of fields that have a text or numbers beside them, the second of their parts
_PARTS = 8  # of a table are looked at, at most
_U16, _I32, _U32, _I64 = (Struct(form).unpack_from for form in ("<H", "<i", "<I", "<q"))
_SOME_U16 = [Struct(f"<{count}H").unpack_from for count in range(_PARTS + 1)]


def require_small(body: bytes, place: str, rows: int, size: int) -> None:
    """ApiError where a stream has more rows or batches than `rows`, or its headers take more bytes than `size`.

    So are compressed buffers, and dictionaries that grow from batch to batch, of which Arrow keeps every state.

    Raises:
        struct.error, IndexError, ValueError: the body is no stream.
    """
    room, dictionaries = Room(size), dict[int, int]()
    counted = batches = 0
    for buffer, body_length in _messages(body):
        message = buffer.root()
        kind, header = buffer.byte(message, _KIND), buffer.table(message, _HEADER)
        room.take_pairs(buffer, message, _MESSAGE_PAIRS)
        if kind != _BATCH:  # which are counted; a megabyte could be 60,000 of the others, each to be looked at
            room.take(_TABLE)
        if kind == _SCHEMA:
            room.take_pairs(buffer, header, _SCHEMA_PAIRS)
            room.take_fields(buffer, header)
        elif kind == _DICTIONARY:
            if buffer.byte(header, _IS_DELTA):
                raise ApiError(415, "delta", "the stream's dictionaries grow from batch to batch; send each whole")
            _require_plain(buffer, buffer.table(header, _DATA))
            dictionaries[buffer.long(header, _ID)] = body_length
        elif kind == _BATCH:
            _require_plain(buffer, header)
            counted += max(0, buffer.long(header, _LENGTH))
            room.take(sum(dictionaries.values()) if batches else 0)
            batches += 1
            require_at_most(rows, max(counted, batches), place)


class Room:
    """Bytes that a stream may still take."""

    def __init__(self, size: int) -> None:
        self._size = self._left = size

    def holds(self, count: int) -> bool:
        """Whether there are so many left."""
        return count <= self._left

    def take(self, count: int) -> None:
        """ApiError where there are not so many left."""
        self._left -= count
        if self._left < 0:
            raise ApiError(413, "body_too_large", f"the stream takes more than {self._size} bytes once it is decoded")

    def take_pairs(self, buffer: "_Buffer", table: int, part: int) -> None:
        """A table's metadata: keys and values."""
        for pair in buffer.tables(table, part):
            self.take(_TABLE + buffer.length(pair, 0) + buffer.length(pair, 1))

    def take_fields(self, buffer: "_Buffer", schema: int) -> None:
        """A schema's fields, and theirs."""
        waiting = [(schema, _FIELDS)]
        while waiting:
            for field in buffer.tables(*waiting.pop()):
                self.take(_TABLE + buffer.length(field, _NAME))
                parts = buffer.parts(field)
                if parts[_FIELD_PAIRS]:
                    self.take_pairs(buffer, field, _FIELD_PAIRS)
                if buffer.byte(field, _TYPE_KIND) in (_TIMESTAMP, _UNION):
                    self.take(4 * buffer.length(buffer.table(field, _TYPE), 1))
                if parts[_CHILDREN]:
                    waiting.append((field, _CHILDREN))


class _Buffer:
    """A flatbuffer's tables, by their places. A part that is left out is 0, or empty."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._parts = dict[int, tuple[int, ...]]()

    def root(self) -> int:
        """The table that all others are parts of."""
        return int(_U32(self._content, 0)[0])

    def parts(self, table: int) -> tuple[int, ...]:
        """Where a table's parts lie, counted from it; 0 for those left out. Tables of one make share the list."""
        place = table - _I32(self._content, table)[0]
        found = self._parts.get(place)
        if found is None:
            count = min(_PARTS, max(0, _U16(self._content, place)[0] // 2 - 2))
            found = _SOME_U16[count](self._content, place + 4) + (0,) * (_PARTS - count)
            self._parts[place] = found
        return found

    def byte(self, table: int, part: int) -> int:
        offset = self.parts(table)[part]
        return self._content[table + offset] if offset else 0

    def long(self, table: int, part: int) -> int:
        offset = self.parts(table)[part]
        return int(_I64(self._content, table + offset)[0]) if offset else 0

    def table(self, table: int, part: int) -> int:
        """Where the part, which is a table, lies."""
        place = table + self.parts(table)[part]
        return int(place + _U32(self._content, place)[0])

    def length(self, table: int, part: int) -> int:
        """Of a text in bytes, or of a list in items."""
        offset = self.parts(table)[part]
        if not offset:
            return 0
        place = table + offset
        return int(_U32(self._content, place + _U32(self._content, place)[0])[0])

    def tables(self, table: int, part: int) -> Iterator[int]:
        """The tables in a list of them."""
        count = self.length(table, part)
        start = self.table(table, part) + 4 if count else 0
        for place in range(start, start + 4 * count, 4):
            yield place + _U32(self._content, place)[0]


def _messages(body: bytes) -> Iterator[tuple[_Buffer, int]]:
    """Each message's header, and the bytes that follow it, in either of the framings that Arrow reads."""
    place = 0
    while place + 4 <= len(body):
        (size,) = _I32(body, place)
        place += 4
        if size == -1:
            (size,) = _I32(body, place)
            place += 4
        if size == 0:
            return
        buffer = _Buffer(body[place : place + size])
        length = buffer.long(buffer.root(), _BODY_LENGTH)
        if size < 0 or length < 0:
            raise ValueError("a message's length is below 0")
        yield buffer, length
        place += size + length


def _require_plain(buffer: _Buffer, batch: int) -> None:
    if buffer.parts(batch)[_COMPRESSION]:
        raise ApiError(415, "compressed", "the stream's buffers are compressed; send them as they are")
