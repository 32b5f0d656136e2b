"""Where in a request stands what scoring has refused. It is looked for once there is such an error, and not before."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import orjson
import pyarrow as pa

from features.columns import as_table, canonical
from features.errors import InputError
from features.fields import DateField, RawField
from features.schema import Schema
from serving.api.bodies import Form
from serving.api.errors import ApiError
from serving.calibration import Unscorable

Columns: TypeAlias = Mapping[str, Sequence[Any]] | pa.Table


def refusal(
    error: InputError, schema: Schema, place: str, body: bytes, form: Form, context: Mapping[str, Any], columns: Columns
) -> ApiError:
    """The error of a request that was parsed, and that the engine then refused.

    Args:
        error: the engine's.
        schema: the model's.
        place: the body's key of the rows: candidates or rows.
        body: as it was sent.
        form: what it is.
        context: what was parsed of it.
        columns: likewise, of the rows.
    """
    if isinstance(error, Unscorable):
        message = "the numbers of this row, or of the context, are too large to be scored"
        return ApiError(422, "bad_value", message, f"{place}[{error.row}]")
    with suppress(InputError):  # of a column that is wrong as a whole, which no check of requests lets by
        for name, _, rule in _wrong(schema, as_table({name: [value] for name, value in context.items()})):
            return ApiError(422, "bad_value", f"the value {rule}", f"context.{name}")
        for name, row, rule in _wrong(schema, as_table(columns)):
            in_rows = form == "json" and isinstance(orjson.loads(body)[place], list)
            location = f"{place}[{row}].{name}" if in_rows else f"{place}.{name}[{row}]"
            return ApiError(422, "bad_value", f"the value {rule}", location)
    return ApiError(422, "bad_value", str(error))


def _wrong(schema: Schema, table: pa.Table) -> Iterator[tuple[str, int, str]]:
    """Column, row and rule of every column's first value that cannot be encoded."""
    fields: list[RawField | DateField] = [*schema.served_fields]
    fields += [field for field in schema.fields if isinstance(field, DateField)]  # which may read a field of theirs
    for field in fields:
        name = field.from_ if isinstance(field, DateField) else field.name
        if name in table.column_names:
            found = canonical(table, field, "" if isinstance(field, DateField) else schema.encoder_of(field))
            if found.bad_N is not None:
                yield name, int(found.bad_N.argmax()), found.rule
