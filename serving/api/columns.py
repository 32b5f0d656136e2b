"""Candidates and rows of a JSON body, in either form, into columns of checked values."""

from operator import itemgetter
from typing import Any

from serving.api.errors import ApiError
from serving.api.values import Check, Sent

Columns = dict[str, list[Any]]


def columns_of(data: Any, place: str, sent: Sent, limit: int) -> Columns:
    """Columns of checked values, from columns or from rows of a JSON body; at most `limit` rows."""
    parts = data.values() if isinstance(data, dict) else [data]
    require_at_most(limit, max((len(part) for part in parts if isinstance(part, list)), default=0), place)
    if isinstance(data, list):
        count, columns = len(data), _from_rows(data, place, sent)
    elif isinstance(data, dict):
        count, columns = _from_columns(data, place, sent)
    else:
        raise ApiError(422, "wrong_type", f"{place} must be an object of columns or an array of rows", place)
    if count == 0 or not columns:
        raise no_rows(place)
    return columns


def require_at_most(limit: int, count: int, place: str) -> None:
    """Before any value is looked at: a request above the limit costs no more than its parsing."""
    if count > limit:
        raise ApiError(413, "too_many_rows", f"{count} {place}; at most {limit} are taken at once", place)


def no_rows(place: str) -> ApiError:
    """The error of a request without anything to score."""
    return ApiError(422, "no_rows", f"{place} is empty", place)


def _from_columns(data: dict[str, Any], place: str, sent: Sent) -> tuple[int, Columns]:
    columns: Columns = {}
    for name, values in data.items():
        where = f"{place}.{name}"
        check = sent.known(name, where)
        if not isinstance(values, list):
            raise ApiError(422, "wrong_type", f"column {name!r} must be an array", where)
        columns[name] = check.column(values, where)
    count = max(map(len, columns.values()), default=0)
    for name, values in columns.items():
        if len(values) != count:
            message = f"column {name!r} has {len(values)} values where others have {count}"
            raise ApiError(422, "ragged_columns", message, f"{place}.{name}")
    return count, columns


def _from_rows(rows: list[Any], place: str, sent: Sent) -> Columns:
    names = list(rows[0]) if rows and isinstance(rows[0], dict) else []
    if names and set(map(type, rows)) == {dict} and set(map(len, rows)) == {len(names)}:
        columns = _alike(rows, names, place, sent)
        if columns is not None:
            return columns
    return _row_by_row(rows, names, place, sent)


def _alike(rows: list[dict[str, Any]], names: list[str], place: str, sent: Sent) -> Columns | None:
    """Rows of the same known fields; None where they are not."""
    if not sent.checks.keys() >= set(names):
        return None
    columns: Columns = {}
    try:
        for name in names:
            check, values = sent.checks[name], list(map(itemgetter(name), rows))
            whole = check.whole(values)
            columns[name] = whole if whole is not None else _one_by_one(check, name, values, place)
    except KeyError:
        return None
    return columns


def _one_by_one(check: Check, name: str, values: list[Any], place: str) -> list[Any]:
    return [check.one(value, f"{place}[{i}].{name}") for i, value in enumerate(values)]


def _row_by_row(rows: list[Any], names: list[str], place: str, sent: Sent) -> Columns:
    columns: Columns = {}
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ApiError(422, "wrong_type", f"{place}[{i}] must be an object of field values", f"{place}[{i}]")
        for name, value in row.items():
            check = sent.known(name, f"{place}[{i}].{name}")
            values = columns.setdefault(name, [])
            if len(values) != i:
                raise ApiError(422, "missing_field", f"field {name!r} is missing before this row", f"{place}[0].{name}")
            values.append(check.one(value, f"{place}[{i}].{name}"))
        for name in names:
            if name not in row:
                message = f"field {name!r} is missing; send null for no value"
                raise ApiError(422, "missing_field", message, f"{place}[{i}].{name}")
    return columns
