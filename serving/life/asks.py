"""What a model asks of those who send requests. A new version that asks for something else breaks its callers."""

from collections.abc import Mapping

from features.errors import InputError
from features.fields import ListField, NumericField, RawField
from features.schema import Schema

Asks = Mapping[str, str]


def asks_of(schema: Schema) -> Asks:
    """What clients send, by name: each field's kind of value, and the columns of times that date fields read.

    Whether a field is the context's is of no consequence: a request may send any field in either place.
    """
    fields = {field.name: _kind(schema, field) for field in schema.served_fields}
    return {**dict.fromkeys(schema.date_columns, "a time"), **fields}


def difference(old: Asks, new: Asks) -> str | None:
    """In words what the new model asks for that the old one does not, or the other way round; None if nothing."""
    told = [f"it asks for {name}" for name in sorted(new.keys() - old.keys())]
    told += [f"it does not take {name}" for name in sorted(old.keys() - new.keys())]
    both = sorted(old.keys() & new.keys())
    told += [f"{name} is {new[name]} and was {old[name]}" for name in both if old[name] != new[name]]
    return "; ".join(told[:5]) + (f"; and {len(told) - 5} more" if len(told) > 5 else "") if told else None


def require_alike(role: str, model: str, champion: Asks, other: Asks) -> None:
    """InputError unless requests that suit the champion suit the model of another role."""
    if reason := difference(champion, other):
        raise InputError(f"{role} {model} does not suit the champion's clients: {reason}")


def _kind(schema: Schema, field: RawField) -> str:
    if isinstance(field, NumericField):
        return "a number"
    item = "a whole number" if schema.encoder_of(field) == "identity" else "text"
    if not isinstance(field, ListField):
        return item
    return f"a list of {item}" + (f", or text with {field.separator!r}" if field.separator else "")
