"""Completes requests with field values that a store has under the request's key."""

from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from features.columns import as_table, canonical
from features.errors import InputError
from features.schema import Schema
from serving.api.errors import ApiError
from serving.api.values import Check, check_of
from serving.settings import Store
from serving.store.base import FeatureStore, StoreDown
from serving.store.parquet_store import ParquetStore, key_field


class Counts(Protocol):
    """What is told of fetches (serving.monitoring.metrics)."""

    def fetch(self, missed: int, timed_out: bool = False) -> None:
        """Keys without a row, or with a value that is none of its field's; whether the store did not answer."""


class Filler:
    """Fetches the fields that a request lacks. A value that is not there, in time and of its field, is null.

    Args:
        store: where rows are.
        schema: what the fields are.
        key: the field whose value is a row's key, in the context or per candidate.
        fields: those that are fetched where a request lacks them.
        watch: is told of what was missed.

    Raises:
        InputError: a field is not in the schema or not sent by clients.
    """

    def __init__(
        self, store: FeatureStore, schema: Schema, key: str, fields: Sequence[str], watch: Counts | None = None
    ) -> None:
        self._store, self._key, self._watch = store, key, watch
        self._key_field = key_field(schema, key)
        self._kinds = kinds_of(schema, key, fields)
        self._key_encoder = schema.encoder_of(self._key_field)
        self._checks = checks_of(schema, key, fields)

    @classmethod
    def of(
        cls, settings: Store, schema: Schema, watch: Counts | None = None, before: "Filler | None" = None
    ) -> "Filler":
        """Open the store that the settings name; InputError where it, or a field, cannot be used.

        What was opened `before` with these settings is used again, but for a file whose values have to be read as
        those of other kinds of fields.
        """
        key_field(schema, settings.key)
        checks_of(schema, settings.key, settings.fields)
        same = before is not None and before._kinds == kinds_of(schema, settings.key, settings.fields)
        store = before._store if before and (same or settings.kind == "redis") else _opened(settings, schema)
        return cls(store, schema, settings.key, settings.fields, watch)

    def fill(self, context: MutableMapping[str, Any], columns: MutableMapping[str, Any]) -> None:
        """Add the fields that are in neither: beside the key, to the context or, one value a row, to the columns.

        Args:
            context: checked values that all rows share; empty where each row has all its fields.
            columns: checked values by row.
        """
        lacking = {n: check for n, check in self._checks.items() if n not in context and n not in columns}
        if not lacking:
            return
        if self._key in columns:
            rows = self._rows(list(columns[self._key]), lacking)
            for name in lacking:
                columns[name] = [row.get(name) for row in rows]
        else:
            (row,) = self._rows([context.get(self._key)], lacking)
            for name in lacking:
                context[name] = row.get(name)

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    def _rows(self, keys: Sequence[Any], checks: Mapping[str, Check]) -> list[Mapping[str, Any]]:
        """Checked values of each key, each different key fetched once."""
        texts = self._texts(keys)
        asked = list(dict.fromkeys(text for text in texts if text is not None))
        if not asked:
            return [{}] * len(keys)
        try:
            found, down = self._store.fetch(asked), False
        except StoreDown:
            found, down = [None] * len(asked), True
        missed, values = 0, dict[str, Mapping[str, Any]]()
        for key, row in zip(asked, found, strict=True):
            values[key], good = _checked(row, checks)
            missed += not good
        if self._watch is not None and (missed or down):
            self._watch.fetch(missed, down)
        return [values[text] if text is not None else {} for text in texts]

    def _texts(self, keys: Sequence[Any]) -> list[str | None]:
        """Keys as text, as encoders see them: 7, "7" and "7.0" are one, and "" is none."""
        try:
            found = canonical(as_table({self._key: keys}), self._key_field, self._key_encoder)
        except InputError:  # the engine will say so
            return [None] * len(keys)
        texts: list[str | None] = found.values.to_pylist()
        return texts


class ChampionFiller:
    """Fills requests by the schema of the champion, whichever that is.

    Args:
        settings: which store, key and fields.
        watch: is told of what was missed.
    """

    def __init__(self, settings: Store, watch: Counts | None = None) -> None:
        self._settings, self._watch = settings, watch
        self._filler: Filler | None = None

    def follow(self, schema: Schema) -> None:
        """From now on a champion has this schema; InputError where its fields are not the settings'."""
        self._filler = Filler.of(self._settings, schema, self._watch, self._filler)

    def fill(self, context: MutableMapping[str, Any], columns: MutableMapping[str, Any]) -> None:
        """See `Filler.fill`."""
        assert self._filler is not None, "it follows no champion yet"
        self._filler.fill(context, columns)

    def close(self) -> None:
        """Close the store."""
        if self._filler is not None:
            self._filler.close()


def kinds_of(schema: Schema, key: str, fields: Sequence[str]) -> list[Any]:
    """What decides how the values of the key and the fields are read."""
    return [(field, schema.encoder_of(field)) for field in schema.served_fields if field.name in (key, *fields)]


def checks_of(schema: Schema, key: str, fields: Sequence[str]) -> dict[str, Check]:
    """The checks of the fields that are fetched; InputError where one cannot be."""
    served = {field.name: field for field in schema.served_fields}
    for name in fields:
        if name == key:
            raise InputError(f"store.fields: {name!r} is the key, which requests have to name")
        if name not in served:
            raise InputError(f"store.fields: {name!r} is no field that clients send; they send {', '.join(served)}")
    return {name: check_of(schema, served[name]) for name in fields}


def _opened(settings: Store, schema: Schema) -> FeatureStore:
    if settings.kind == "parquet":
        return ParquetStore(Path(settings.url), schema, settings.key, settings.fields)
    from serving.store.redis_store import RedisStore  # its client is an extra

    return RedisStore(settings.url, settings.prefix, settings.timeout_ms)


def _checked(row: Mapping[str, Any] | None, checks: Mapping[str, Check]) -> tuple[dict[str, Any], bool]:
    """A row's values as if they had been sent, null for what is not there or wrong; whether nothing was."""
    values: dict[str, Any] = {}
    good = row is not None
    for name, check in checks.items():
        try:
            values[name] = check.one((row or {}).get(name), name)
        except ApiError:
            values[name], good = None, False
    return values, good
