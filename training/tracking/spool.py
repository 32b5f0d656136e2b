"""What a run records, on disk until MLflow has it: a line of JSON each, and how far they have been sent."""

import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from features.errors import InputError, one_line
from features.files import file_written_whole

Record = dict[str, Any]
_BATCH_BYTES = 1 << 18  # of lines that are read at once; a metric takes some fifty
_TAIL_BYTES = 1 << 23  # of the newest lines, where a resumed run looks for what it records once more


class Batch(NamedTuple):
    """Whole records, oldest first, and the offset in the file where they end."""

    records: list[Record]
    end: int


class Spool:
    """FOLDER/records.jsonl, to which every thread may add, and FOLDER/sent.json, the bytes of it that were sent.

    A line that a killed process has left torn is cut off. When the disk is full, or cannot be written for another
    reason, nothing more is taken, `fault` tells why, and what is on the disk can still be sent.
    """

    def __init__(self, folder: Path) -> None:
        """Open or make the spool.

        Raises:
            InputError: the folder cannot be written.
        """
        self.path, self._sent_path = folder / "records.jsonl", folder / "sent.json"
        self.fault: str | None = None
        self._lock, self._disk = threading.Lock(), threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self._written = _cut_torn_line(self.path)
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror}") from None
        self._pending: list[bytes] = []
        self.sent = min(_offset(self._sent_path), self._written)

    def append(self, record: Record) -> None:
        """Take a record; it is on disk after the next `flush`."""
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            if self.fault is None:
                self._pending.append(line)

    def flush(self) -> None:
        """Hand what was taken to the file system, where it outlives this process."""
        with self._disk:  # one writer at a time, while others may still append
            with self._lock:
                content = b"".join(self._pending)
                self._pending.clear()
            if not content or self.fault is not None:
                return
            try:
                with self.path.open("ab") as file:
                    file.write(content)
                self._written += len(content)
            except OSError as error:
                self.fault = one_line(error)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever flushed."""
        return self._written == 0

    @property
    def unsent_bytes(self) -> int:
        """Bytes of the flushed lines that were not sent."""
        return self._written - self.sent

    def unsent(self) -> Batch | None:
        """The oldest flushed records that were not sent, or None."""
        if not self.unsent_bytes:
            return None
        with self.path.open("rb") as file:
            file.seek(self.sent)
            lines = file.readlines(min(_BATCH_BYTES, self.unsent_bytes))
        return Batch([json.loads(line) for line in lines], self.sent + sum(map(len, lines)))

    def mark_sent(self, end: int) -> None:
        """Remember that all before the offset `end` was sent; 0 sends everything anew."""
        self.sent = end
        # Known in this process in any case; a later one sends a batch twice, which changes nothing in MLflow.
        with suppress(OSError), file_written_whole(self._sent_path) as aside:
            aside.write_text(json.dumps({"offset": end}))

    def tail(self) -> list[Record]:
        """The newest records, some hundred thousand numbers of them."""
        with self.path.open("rb") as file:
            if self._written > _TAIL_BYTES:
                file.seek(self._written - _TAIL_BYTES)
                file.readline()
            return [json.loads(line) for line in file.read(self._written - file.tell()).splitlines()]


def _cut_torn_line(path: Path) -> int:
    """Cut the file after its last line's end and return its size."""
    with path.open("rb+") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _BATCH_BYTES)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)
        return end


def _offset(path: Path) -> int:
    try:
        return int(json.loads(path.read_bytes())["offset"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # sent once more, which changes nothing in MLflow
