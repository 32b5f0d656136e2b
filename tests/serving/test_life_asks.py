"""What a schema asks of clients, and which change of it they would notice."""

from typing import Any

import pytest

from features.errors import InputError
from features.schema import Schema
from serving.life.asks import asks_of, difference, require_alike

FIELDS: list[dict[str, Any]] = [
    {"name": "user", "type": "categorical"},
    {"name": "item", "type": "categorical", "encoder": "hash", "buckets": 10},
    {"name": "slot", "type": "categorical", "encoder": "identity", "buckets": 4},
    {"name": "age", "type": "numeric"},
    {"name": "tags", "type": "list", "separator": "|"},
    {"name": "codes", "type": "list", "encoder": "identity", "buckets": 9},
    {"name": "also", "type": "list", "share_with": "slot"},
    {"name": "hour", "type": "date", "from": "seen", "part": "hour"},
    {"name": "place", "type": "categorical", "training_only": {"default": "1"}},
    {"name": "user_x_item", "type": "cross", "of": ["user", "item"], "buckets": 10},
]


def schema(fields: list[dict[str, Any]], context: tuple[str, ...] = ("user",)) -> Schema:
    return Schema.model_validate({"name": "s", "label": {"column": "y"}, "context": context, "fields": fields})


def changed(name: str, **keys: Any) -> list[dict[str, Any]]:
    return [field | keys if field["name"] == name else field for field in FIELDS]


def without(name: str) -> list[dict[str, Any]]:
    return [field for field in FIELDS if field["name"] != name]


def test_what_is_asked_for() -> None:
    assert asks_of(schema(FIELDS)) == {
        "user": "text",
        "item": "text",
        "slot": "a whole number",
        "age": "a number",
        "tags": "a list of text, or text with '|'",
        "codes": "a list of a whole number",
        "also": "a list of a whole number",
        "seen": "a time",
    }


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ([*FIELDS, {"name": "shop", "type": "categorical"}], "it asks for shop"),
        (without("age"), "it does not take age"),
        (without("hour"), "it does not take seen"),
        (changed("tags", separator=","), "tags is a list of text, or text with ',' and was a list of text, or text"),
        (changed("item", encoder="identity"), "item is a whole number and was text"),
    ],
)
def test_clients_would_notice(fields: list[dict[str, Any]], told: str) -> None:
    found = difference(asks_of(schema(FIELDS)), asks_of(schema(fields)))
    assert found is not None
    assert found.startswith(told)
    with pytest.raises(InputError, match=r"^shadow runs/x does not suit the champion's clients: "):
        require_alike("shadow", "runs/x", asks_of(schema(FIELDS)), asks_of(schema(fields)))


@pytest.mark.parametrize(
    "other",
    [
        schema(list(reversed(FIELDS))),
        schema(FIELDS, context=("user", "age")),
        schema(changed("item", buckets=99)),
        schema(without("user_x_item")),
        schema(without("place")),
        schema(changed("age", encoder="standard")),
        schema(changed("hour", part="weekday")),
    ],
    ids=["order", "context", "buckets", "cross", "training only", "encoder", "part"],
)
def test_clients_would_not_notice(other: Schema) -> None:
    assert difference(asks_of(schema(FIELDS)), asks_of(other)) is None
    require_alike("shadow", "runs/x", asks_of(schema(FIELDS)), asks_of(other))
