"""Put rows of Parquet files into Redis, where `masknet serve` with `store: {kind: redis}` finds them.

    python -m serving.store.load PARQUET… --url redis://localhost:6379/0 --key user_id [--fields age,gender]
                                          [--prefix masknet:user:] [--expire-seconds N]

Each row becomes one string, prefix + key, with a JSON object of the fields' values; a key that is there is replaced, so
that of two rows with one key the last counts. A row without a key is passed over. The number of rows goes to standard
output.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterable, Iterator
from datetime import date, datetime
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from features.columns import as_strings, column_of, plain
from features.errors import InputError, one_line
from features.sources import Source, find_sources
from serving.store.redis_store import connect

URL_VARIABLE = "MASKNET_STORE_URL"  # a password does not belong on a command line
_BATCH = 2000  # rows of one round trip
_TIMEOUT_MS = 10_000.0


def load(
    sources: list[str],
    url: str,
    key: str,
    fields: list[str] | None,
    prefix: str = "",
    expire_seconds: int | None = None,
) -> int:
    """Write the rows; how many.

    Args:
        sources: Parquet files, folders, globs or URIs.
        url: Redis, as in `store.url`.
        key: the column with the keys.
        fields: the columns to write; by default all but the key.
        prefix: of the keys, as in `store.prefix`.
        expire_seconds: after which Redis drops them; by default never.

    Raises:
        InputError: a file cannot be read or lacks a column, or Redis cannot be reached.
    """
    import redis

    client, rows = connect(url, _TIMEOUT_MS), 0
    try:
        for source in find_sources(sources):
            for batch in _batches(source, key, fields):
                with client.pipeline(transaction=False) as pipe:
                    for name, row in _entries(batch, key):
                        pipe.set(prefix + name, row, ex=expire_seconds)
                        rows += 1
                    answers = pipe.execute(raise_on_error=False)  # its own error would tell the row
                for error in answers:
                    if isinstance(error, redis.RedisError):
                        raise error
    except (redis.RedisError, OSError) as error:
        raise InputError(f"Redis does not take the rows: {one_line(error)}") from None
    finally:
        client.close()
    return rows


def _batches(source: Source, key: str, fields: list[str] | None) -> Iterator[pa.Table]:
    filesystem, path = source.filesystem()
    try:
        file = pq.ParquetFile(filesystem.open_input_file(path))
        columns = None if fields is None else [key, *fields]
        for name in columns or [key]:
            if name not in file.schema_arrow.names:
                raise InputError(f"input {source.path} has no column {name!r}")
        for batch in file.iter_batches(_BATCH, columns=columns):
            yield pa.Table.from_batches([batch])
    except pa.ArrowException as error:
        raise InputError(f"input {source.path} is not a readable Parquet file: {one_line(error)}") from None


def _entries(table: pa.Table, key: str) -> Iterable[tuple[str, bytes]]:
    """Keys, as encoders see them, and rows as JSON."""
    keys = as_strings(plain(column_of(table, key)), key).values.to_pylist()
    for name, row in zip(keys, table.drop_columns(key).to_pylist(), strict=True):
        if name is not None:
            try:
                yield name, orjson.dumps({field: _plain(value) for field, value in row.items()})
            except orjson.JSONEncodeError as error:
                raise InputError(f"row {name!r} cannot be written as JSON: {error}") from None


def _plain(value: Any) -> Any:
    """As clients may send it: NaN is null, and a whole number has no point, since pandas writes ids so beside nulls."""
    if isinstance(value, float):
        whole = math.isfinite(value) and value.is_integer() and abs(value) < 2**53
        return int(value) if whole else (None if value != value else value)
    if isinstance(value, (bytes, date, datetime)):
        raise InputError(f"a column holds {type(value).__name__}: fields are text, numbers or lists of them")
    return [_plain(part) for part in value] if isinstance(value, list) else value


def main() -> None:
    """The command line; a wrong input is one line on standard error, and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m serving.store.load", description="Put rows of Parquet into Redis.")
    parser.add_argument("sources", nargs="+", metavar="PARQUET", help="file, folder, glob or URI")
    parser.add_argument("--url", default=os.environ.get(URL_VARIABLE), help=f"of Redis; by default {URL_VARIABLE}")
    parser.add_argument("--key", required=True, help="column with the keys, such as user_id")
    parser.add_argument("--fields", help="columns to write, with commas between; by default all")
    parser.add_argument("--prefix", default="", help="of the keys, as in store.prefix")
    parser.add_argument("--expire-seconds", type=int, help="after which Redis drops a row; by default never")
    options = parser.parse_args()
    fields = options.fields.split(",") if options.fields else None
    try:
        if not options.url:
            raise InputError(f"--url or {URL_VARIABLE} must name a Redis")
        rows = load(options.sources, options.url, options.key, fields, options.prefix, options.expire_seconds)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    sys.stdout.write(f"{rows} rows\n")


if __name__ == "__main__":
    main()
