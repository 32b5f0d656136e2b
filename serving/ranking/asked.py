"""What is asked of a model, encoded: a request's context once and its candidates, or rows.

Legend: N candidates or rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from features.columns import Rows, as_table
from features.errors import InputError
from features.id_maps import IdMap
from features.online import Encoded, Ids, OnlineEncoder
from features.online_columns import Column
from features.pipeline import FeaturePipeline
from features.schema import Schema

ENCODE_AT_ONCE = 16_384  # rows of a table: bounds memory


@dataclass(frozen=True)
class Asked:
    """Ids and values of N rows; with `split`, those of the model's context are there once."""

    encoded: Encoded
    rows: int
    split: bool


class Encoding:
    """Encodes for one model.

    `context` are the fields that its network takes once per request: those of the schema's context, those derived of
    them alone or of the request's time, and those that serving does not know; none where that leaves no other field.

    Args:
        schema: which fields are context.
        pipeline: the fitted encoders.
        id_maps: rows of managed fields' ids, by the fields that own the tables.
    """

    def __init__(self, schema: Schema, pipeline: FeaturePipeline, id_maps: Mapping[str, IdMap]) -> None:
        self._online, self._pipeline, self._id_maps = OnlineEncoder(pipeline), pipeline, id_maps
        sent = {field.name for field in schema.served_fields}
        self._times = schema.date_columns
        usual = self._online.shared({*schema.context, *(name for name in self._times if name not in sent)})
        context = tuple(name for name in pipeline.names if name in usual)
        self.context = context if schema.context and len(context) < len(pipeline.names) else ()
        self.fixed = self._online.shared(())  # what serving does not know

    def request(self, context: Mapping[str, Any], candidates: Rows, time: datetime) -> Asked:
        """A ranking request; `time` is what date fields read where there is no column of theirs."""
        columns = _columns(candidates)
        given = columns.keys() if isinstance(columns, Mapping) else columns.column_names
        twice = next((name for name in context if name in given), None)
        if twice is not None:
            raise InputError(f"field {twice!r} is given both in the context and per candidate")
        once = dict(context) | {name: time for name in self._times if name not in given and name not in context}
        count = _count(columns)
        shared = self._online.shared(once)
        encoded = None
        if count is not None:
            rows = {name: columns[name] for name in given}
            encoded = self._online.encode(rows | {name: [value] for name, value in once.items()})
        if encoded is None or count is None:
            table = as_table(columns)
            for name, value in once.items():
                table = table.append_column(name, _repeat(value, table.num_rows))
            encoded, count = Encoded.of(self._pipeline.encode(table), shared), table.num_rows
        return self._asked(encoded, count, split=bool(self.context and count) and shared.issuperset(self.context))

    def rows(self, rows: Rows) -> Asked | None:
        """Rows with every field that is sent; None where it takes the pipeline to encode them, or to refuse them."""
        columns = _columns(rows)
        count = _count(columns)
        names = columns.keys() if isinstance(columns, Mapping) else columns.column_names
        encoded = None if count is None else self._online.encode({name: columns[name] for name in names})
        return None if encoded is None or count is None else self._asked(encoded, count, split=False)

    def by_pipeline(self, rows: Rows) -> Asked:
        """The same by the pipeline; InputError names the field and row that cannot be encoded."""
        return self.encoded(self._pipeline.encode(rows))

    def encoded(self, table: pa.Table) -> Asked:
        """Rows that the pipeline has encoded; training-only fields count as their defaults."""
        encoded = Encoded.of(self._pipeline.as_served(table), self.fixed)
        return self._asked(encoded, table.num_rows, split=False)

    def _asked(self, encoded: Encoded, rows: int, split: bool) -> Asked:
        for name, owner in self._pipeline.managed.items():
            ids_K, lengths_N = encoded.ids[name]
            encoded.ids[name] = Ids(self._id_maps[owner].rows(ids_K.astype(np.int64, copy=False)), lengths_N)
        return Asked(encoded, rows, split)


def parts_of(rows: Rows) -> Iterator[Rows]:
    """Large tables in parts; whatever else in one."""
    columns = _columns(rows)
    if not isinstance(columns, pa.Table) or columns.num_rows <= ENCODE_AT_ONCE:
        yield columns
        return
    for start in range(0, columns.num_rows, ENCODE_AT_ONCE):
        yield columns.slice(start, ENCODE_AT_ONCE)


def _columns(rows: Rows) -> pa.Table | Mapping[str, Sequence[Any]]:
    return as_table(rows) if isinstance(rows, (pd.DataFrame, Sequence)) else rows


def _count(columns: pa.Table | Mapping[str, Column]) -> int | None:
    """The number of rows; None where there are none, or columns differ in it."""
    if isinstance(columns, pa.Table):
        return columns.num_rows or None
    counts = {len(values) for values in columns.values()}
    return counts.pop() if len(counts) == 1 and counts != {0} else None


def _repeat(value: Any, times: int) -> pa.Array:
    return pa.array([value]).take(pa.array(np.zeros(times, np.int64)))
