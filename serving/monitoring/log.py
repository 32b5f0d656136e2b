"""The prediction log: a sample of requests with their scores, in Parquet files that appear whole and are kept a while.

A worker's files are `predictions-<worker>-<UTC of the first row>-<process>-<number>.parquet`. One that is being written
has a name with a dot in front, which readers pass over, and a lock. A killed worker loses the rows of such a file.
"""

import fcntl
import hashlib
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import InputError
from features.schema import Schema
from serving.failures import log_failure
from serving.monitoring.log_rows import Followed
from serving.settings import PredictionLog
from serving.trace import Trace

WAITING = 64  # requests between the service and the thread that writes
GROUP_ROWS = 10_000  # of a row group: what is held in memory
_log = logging.getLogger(__name__)

OnDrop = Callable[[int], None]


def is_sampled(request_id: str, share: float) -> bool:
    """Whether a request is in a sample of this share: the same wherever it is asked; larger shares contain smaller."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2.0**64


class PredictionLogWriter:
    """Writes sampled requests in a thread of its own; where that cannot keep up, they are dropped and counted."""

    def __init__(self, settings: PredictionLog, worker: int, on_drop: OnDrop) -> None:
        self._share, self._on_drop = settings.share, on_drop
        self._rows, self._files = Followed(), _Files(settings, worker)
        self._waiting: queue.Queue[tuple[Trace, datetime] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="masknet prediction log", daemon=True)
        self._thread.start()

    @classmethod
    def of(
        cls, settings: PredictionLog | None, worker: int, on_drop: OnDrop = lambda count: None
    ) -> "PredictionLogWriter | None":
        """The log that the settings ask for, or None. Nothing is offered to it before it follows a model.

        Args:
            settings: where, how much and how long.
            worker: this process's number among those that write there.
            on_drop: told how many requests were left out.

        Raises:
            InputError: the folder cannot be written to.
        """
        return None if settings is None else cls(settings, worker, on_drop)

    def follow(self, name: str, version: str, schema: Schema) -> None:
        """Log what this version answers, from now on the champion, in columns of its schema.

        What the one before has answered keeps its own; a file has rows of one kind.
        """
        self._rows.add(name, version, schema)

    def offer(self, trace: Trace) -> None:
        """Log a scored request if it is in the sample."""
        if trace.score_N is None or not is_sampled(trace.request_id, self._share):
            return
        try:
            self._waiting.put_nowait((trace, datetime.now(UTC)))
        except queue.Full:
            self._on_drop(1)

    def close(self) -> None:
        """Write what waits and end the last file."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                item = self._waiting.get(timeout=self._files.seconds_left())
            except queue.Empty:
                self._safely(self._files.end)
                continue
            if item is None:
                self._safely(self._files.end)
                return
            try:
                rows = self._rows.of(*item)
            except Exception:
                log_failure(_log, "a request is not in the prediction log")
                self._on_drop(1)
                continue
            self._safely(lambda rows=rows: self._files.add(rows))  # type: ignore[misc]

    def _safely(self, work: Callable[[], None]) -> None:
        """A full disk costs log rows and no answers."""
        try:
            work()
        except Exception:
            log_failure(_log, "rows of the prediction log were lost")
            self._on_drop(self._files.forget())


class _Files:
    """One worker's files: the one being written, and how many older ones are kept."""

    def __init__(self, settings: PredictionLog, worker: int) -> None:
        self._settings, self._prefix = settings, f"predictions-{worker:03d}-"
        self._process = secrets.token_hex(3)  # another service may write to the folder, with workers of these numbers
        self._writer: pq.ParquetWriter | None = None
        self._file: IO[bytes] | None = None
        self._target = settings.folder
        self._held: list[pa.Table] = []
        self._held_rows = self._file_rows = self._requests = self._number = 0
        self._until = 0.0
        try:
            settings.folder.mkdir(parents=True, exist_ok=True)
            for left in settings.folder.glob(f".{self._prefix}*"):
                _remove_unlocked(left)  # by a worker that was killed
        except OSError as error:
            raise InputError(f"log.folder {settings.folder} cannot be written to: {error.strerror}") from None

    def seconds_left(self) -> float | None:
        """Until the file being written has to end; None where there is none."""
        return None if self._writer is None else max(0.0, self._until - time.monotonic())

    def add(self, rows: pa.Table) -> None:
        """Append a request's rows, in a new file where they have other columns."""
        if self._writer is not None and self._writer.schema != rows.schema:
            self.end()
        self._requests += 1
        if self._writer is None:
            self._begin(rows.schema)
        self._held.append(rows)
        self._held_rows += rows.num_rows
        self._file_rows += rows.num_rows
        full = self._file_rows >= self._settings.file_rows
        if self._held_rows >= GROUP_ROWS:
            self._write()
        if full or not self.seconds_left():
            self.end()

    def end(self) -> None:
        """Give the file its name, and delete the oldest ones that are too many."""
        if self._writer is None or self._file is None:
            return
        self._write()
        self._writer.close()
        self._writer = None
        self._file.flush()
        self._aside.replace(self._target)
        self._let_go()
        for old in sorted(self._settings.folder.glob(f"{self._prefix}*"))[: -self._settings.keep_files]:
            old.unlink(missing_ok=True)  # another service may keep to the same number

    def forget(self) -> int:
        """Give up the file being written; how many requests are lost."""
        lost, writer, self._writer, self._held, self._held_rows = self._requests, self._writer, None, [], 0
        with suppress(OSError):
            if writer is not None:
                writer.close()
        with suppress(OSError):
            self._aside.unlink(missing_ok=True)
        self._let_go()
        return lost

    @property
    def _aside(self) -> Path:
        return self._target.with_name(f".{self._target.name}")

    def _begin(self, schema: pa.Schema) -> None:
        self._number += 1
        name = f"{self._prefix}{datetime.now(UTC):%Y%m%dT%H%M%S}-{self._process}-{self._number:06d}.parquet"
        self._target, self._file_rows = self._settings.folder / name, 0
        self._until = time.monotonic() + self._settings.file_seconds
        self._file = self._aside.open("wb")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._writer = pq.ParquetWriter(self._file, schema, compression="zstd")

    def _let_go(self) -> None:
        file, self._file, self._requests = self._file, None, 0
        with suppress(OSError):
            if file is not None:
                file.close()

    def _write(self) -> None:
        if self._held and self._writer is not None:
            self._writer.write_table(pa.concat_tables(self._held).combine_chunks())
            self._held, self._held_rows = [], 0


def _remove_unlocked(path: Path) -> None:
    """Remove a file that no process is writing."""
    with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
