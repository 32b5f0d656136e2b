"""A feature store in memory, read from a Parquet file when it is opened."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.columns import canonical
from features.errors import InputError, one_line
from features.fields import CategoricalField, RawField
from features.hashing import HashIndex, hash_text
from features.schema import Schema

_ABSENT = 2**31 - 1  # more rows than an index holds
_log = logging.getLogger(__name__)


class ParquetStore:
    """The columns of a file as Arrow has them, and an index of 32 bytes a row over the hashes of its keys.

    Of two rows with one key the last counts, as in Redis, where it replaces the other; rows without a key are left out.
    A value that is none of its field's is missing, and the key of a row is compared as text, so that its hash alone
    decides nothing.
    """

    def __init__(self, path: Path, schema: Schema, key: str, fields: Sequence[str]) -> None:
        """Read the file; InputError where it cannot be read, or lacks a column."""
        specs: dict[str, RawField] = {field.name: field for field in schema.served_fields}
        try:
            missing = [name for name in (key, *fields) if name not in pq.read_schema(path).names]
            if missing:
                raise InputError(f"store {path} has no column {missing[0]!r}")
            table = pq.read_table(path, columns=[key, *fields])
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"store {path} is not a readable Parquet file: {one_line(error)}") from None
        try:
            found = {name: canonical(table, specs[name], schema.encoder_of(specs[name])) for name in (key, *fields)}
        except InputError as error:
            raise InputError(f"store {path}: {error}") from None
        bad = sum(int(column.bad_N.sum()) for column in found.values() if column.bad_N is not None)
        if bad:
            _log.warning("feature store %s: %d values are none of their fields' and count as missing", path, bad)
        keyed = found[key].values.is_valid()
        self._keys = found[key].values.filter(keyed)
        self._table = pa.table({name: found[name].values.filter(keyed) for name in fields})
        rows_N = np.arange(len(self._keys), dtype=np.int32)
        self._index = HashIndex(hash_text(self._keys)[::-1], rows_N[::-1], _ABSENT)  # of equal keys it takes the first

    def __len__(self) -> int:
        """How many rows have a key."""
        return len(self._keys)

    def fetch(self, keys: Sequence[str]) -> Sequence[Mapping[str, Any] | None]:
        """See `serving.store.base.FeatureStore`."""
        row_N = self._index.find(hash_text(pa.array(keys, pa.string())))
        if not len(self):
            return [None] * len(keys)
        there = pa.array(np.where(row_N == _ABSENT, 0, row_N))
        rows, found = self._table.take(there).to_pylist(), self._keys.take(there).to_pylist()
        return [
            row if number != _ABSENT and same == key else None
            for row, number, same, key in zip(rows, row_N.tolist(), found, keys, strict=True)
        ]

    def close(self) -> None:
        """Nothing is open."""


def key_field(schema: Schema, key: str) -> CategoricalField:
    """The field that has the key; InputError where it cannot be one."""
    field = next((field for field in schema.served_fields if field.name == key), None)
    if not isinstance(field, CategoricalField):
        raise InputError(f"store.key: {key!r} is no categorical field that clients send")
    return field
