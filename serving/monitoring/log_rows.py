"""A served request as rows that `masknet prepare` reads: raw values as they were sent, and what was answered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from features.columns import as_table, canonical
from features.fields import CategoricalField, ListField, NumericField, RawField
from features.schema import Schema
from serving.trace import Trace

TIMESTAMP = pa.timestamp("us", "UTC")
OWN = {
    "request_id": pa.string(),
    "time": TIMESTAMP,  # of the answer
    "model": pa.string(),
    "version": pa.string(),
    "role": pa.string(),
    "index": pa.int32(),  # the row's place in the request
    "score": pa.float32(),
}
_WHOLE_LIST = 2**31 - 1  # lists are cut when they are encoded, not here


def own_name(column: str, schema: Schema) -> str:
    """The name of one of the log's own columns, in a log of a model in whose rows that name may be taken."""
    return f"served_{column}" if column in schema.raw_columns else column


@dataclass(frozen=True)
class LogRows:
    """Requests to a model with this schema as rows.

    Columns: the log's own (`OWN`), the fields that clients send, others that were sent to a model with more fields, and
    the columns of times (of date fields, and the schema's `time`) as timestamps, which any `format` reads.
    """

    schema: Schema
    _guesses: dict[str, RawField] = field(default_factory=dict, init=False)  # of the others, once a value has come

    def of(self, trace: Trace, at: datetime) -> pa.Table:
        """A row per candidate, the context in each."""
        assert trace.score_N is not None
        rows = len(trace.score_N)
        own = {
            "request_id": [trace.request_id], "time": [at], "model": [trace.name], "version": [trace.version],
            "role": [trace.role], "index": np.arange(rows, dtype=np.int32), "score": trace.score_N,
        }  # fmt: skip
        columns = {own_name(name, self.schema): _fit(pa.array(own[name], kind), rows) for name, kind in OWN.items()}
        context, per_row = dict(trace.context), _by_name(trace.columns)
        for name, spec in self._specs(context, per_row).items():
            values = per_row[name] if name in per_row else [context.get(name)]
            columns[name] = _fit(_raw(values, spec), rows)
        for name in self._times:
            columns[name] = _fit(_times(per_row.get(name, [context.get(name, trace.time or at)])), rows)
        return pa.table(columns)

    @property
    def _times(self) -> list[str]:
        """The columns that hold nothing but times."""
        fields = {field.name for field in self.schema.served_fields}
        time = [self.schema.time.column] if self.schema.time else []
        return [name for name in dict.fromkeys([*self.schema.date_columns, *time]) if name not in fields]

    def _specs(self, context: Mapping[str, Any], per_row: Mapping[str, Any]) -> dict[str, RawField]:
        known: dict[str, RawField] = {field.name: field for field in self.schema.served_fields}
        others = [name for name in [*context, *per_row] if name not in known and name not in self._times]
        return known | {name: self._guess(name, per_row.get(name, [context.get(name)])) for name in others}

    def _guess(self, name: str, values: Sequence[Any] | pa.ChunkedArray) -> RawField:
        """The same for all requests: a file's rows are of one kind, and a request without values shows none."""
        if name in self._guesses:
            return self._guesses[name]
        guessed = _guessed(name, values)
        if any(value is not None for value in (values.to_pylist() if isinstance(values, pa.ChunkedArray) else values)):
            self._guesses[name] = guessed
        return guessed


class Followed:
    """The rows of the champion, and of those that it has replaced and whose answers are on their way to the log."""

    _KEPT = 3

    def __init__(self) -> None:
        self._of: dict[tuple[str, str], LogRows] = {}

    def add(self, name: str, version: str, schema: Schema) -> None:
        """A model that is the champion from now on."""
        others = [item for item in self._of.items() if item[0] != (name, version)]
        self._of = {**dict(others[1 - self._KEPT :]), (name, version): LogRows(schema)}

    def of(self, trace: Trace, at: datetime) -> pa.Table:
        """See `LogRows.of`. Challengers and shadows take what the champion does, and share its files."""
        rows = self._of.get((trace.name, trace.version)) if trace.role == "champion" else None
        return (rows or list(self._of.values())[-1]).of(trace, at)


def _by_name(columns: Mapping[str, Any] | pa.Table) -> dict[str, Any]:
    if isinstance(columns, pa.Table):
        return {name: columns[name] for name in columns.column_names}
    return dict(columns)


def _raw(values: Sequence[Any] | pa.ChunkedArray, spec: RawField) -> pa.Array:
    whole = spec.model_copy(update={"max_length": _WHOLE_LIST}) if isinstance(spec, ListField) else spec
    sent = pa.table({spec.name: values}) if isinstance(values, pa.ChunkedArray) else as_table({spec.name: values})
    return canonical(sent, whole).values


def _guessed(name: str, values: Sequence[Any] | pa.ChunkedArray) -> RawField:
    """What a column that the schema does not know holds, by its values."""
    kind = values.type if isinstance(values, pa.ChunkedArray) else pa.infer_type(list(values))
    if pa.types.is_list(kind):
        return ListField(name=name, type="list")
    if pa.types.is_floating(kind):
        return NumericField(name=name, type="numeric")
    return CategoricalField(name=name, type="categorical")


def _times(values: Sequence[Any] | pa.ChunkedArray) -> pa.Array:
    """Times as sent: datetimes (UTC where they name no zone), or timestamps of a table."""
    if isinstance(values, pa.ChunkedArray):
        return values.combine_chunks().cast(TIMESTAMP)
    aware = [value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value for value in values]
    return pa.array(aware, TIMESTAMP)


def _fit(column: pa.Array, rows: int) -> pa.Array:
    """The column, or its one value as often as there are rows."""
    return column if len(column) == rows else column.take(pa.array(np.zeros(rows, np.int64)))
