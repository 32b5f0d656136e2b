"""Schema files: what is accepted, and how a mistake is told."""

from pathlib import Path
from typing import Any

import pytest

from features.errors import InputError
from features.schema import Schema, load_schema
from features.validation import validate

GOOD = """
name: shop
label: {column: click}
context: [user]
fields:
  - {name: user, type: categorical}
  - {name: tags, type: list, separator: "|", pooling: sum, max_length: 3}
  - {name: price, type: numeric, buckets: 4}
"""


def read(tmp_path: Path, text: str) -> Schema:
    path = tmp_path / "schema.yaml"
    path.write_text(text)
    return load_schema(path)


def test_fields_keep_their_order_and_defaults(tmp_path: Path) -> None:
    schema = read(tmp_path, GOOD)
    assert [field.name for field in schema.fields] == ["user", "tags", "price"]
    assert schema.candidate_fields == ("tags", "price")
    assert schema.raw_columns == ("user", "tags", "price", "click")
    assert schema.label.comparison is None


@pytest.mark.parametrize(
    ("positive", "value", "expected"), [(">= 4", 4, True), (">= 4", 3, False), ("<2", 1, True), ("== -1.5", -1.5, True)]
)
def test_label_comparison(tmp_path: Path, positive: str, value: float, expected: bool) -> None:
    schema = read(tmp_path, GOOD.replace("{column: click}", f'{{column: click, positive: "{positive}"}}'))
    assert schema.label.comparison is not None
    compare, bound = schema.label.comparison
    assert compare(value, bound) is expected


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("name: shop", "name: shop\ncolour: red", "colour: unknown key"),
        ("buckets: 4", "bukets: 4", "bukets: unknown key"),
        ("label: {column: click}", "", "label: required key is missing"),
        ("context: [user]", "context: [nobody]", "'nobody' is not a field"),
        ("{column: click}", '{column: click, positive: "around 3"}', "not a comparison"),
        ("{column: click}", "{column: price}", "the model would see the answer"),
        ("name: tags", "name: user", "'user' is defined twice"),
        ("name: tags", "name: _tags", "starts with an underscore"),
        ("type: categorical", "type: categorical, encoder: hash", "needs buckets"),
        ("type: categorical", "type: categorical, buckets: 9", "belongs to encoder hash, identity and managed"),
        (
            "type: categorical",
            "type: categorical, encoder: hash, buckets: 9, min_count: 3",
            "min_count: it belongs to encoder vocabulary",
        ),
        ("type: categorical", "type: class", "class"),
        ("name: shop", "name: shop\ncsv: {header: false}", "columns must name"),
        ("name: shop", "name: shop\ncsv: {columns: [a]}", "be left out when it is true"),
        ("context: [user]", "context: [user, user]", "names a field twice"),
        ("name: tags", 'name: ""', "fields.1"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file_and_the_key(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in GOOD
    with pytest.raises(InputError, match=r"schema\.yaml") as error:
        read(tmp_path, GOOD.replace(old, new))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "told"), [("- a\n- b", "must be a mapping"), ("a: [", "is not YAML")])
def test_not_a_schema_at_all(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        read(tmp_path, text)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_schema(tmp_path / "absent.yaml")


FIELDS = {
    "c": {"name": "c", "type": "categorical"},
    "l": {"name": "l", "type": "list", "separator": " "},
    "v": {"name": "v", "type": "numeric", "encoder": "standard"},
    "p": {"name": "p", "type": "categorical", "encoder": "identity", "buckets": 9, "training_only": {"default": 1}},
}


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ({"type": "cross", "of": ["c", "nobody"], "buckets": 9}, "crosses 'nobody'"),
        ({"type": "cross", "of": ["c", "v"], "buckets": 9}, "crosses 'v', which is no field with ids"),
        ({"type": "cross", "of": ["c", "p"], "buckets": 9}, "crosses 'p', which serving does not know"),
        ({"type": "cross", "of": ["c"], "buckets": 9}, "at least 2"),
        ({"type": "cross", "of": ["l", "l"], "buckets": 9}, "several lists"),
        ({"type": "date", "from": "p", "part": "hour"}, "which serving does not know"),
        ({"type": "date", "from": "t", "part": "minute"}, "part"),
        ({"type": "date", "from": "t", "part": "hour", "timezone": "Mars/Olympus"}, "'Mars/Olympus' is no time zone"),
        ({"type": "date", "from": "t", "part": "hour", "timezone": "localtime"}, "'localtime' is no time zone"),
        ({"type": "date", "from": "y", "part": "hour"}, "the model would see the answer"),
        ({"type": "categorical", "share_with": "v"}, "shares with 'v'"),
        ({"type": "categorical", "share_with": "c", "min_count": 3}, "min_count: share_with takes it"),
        ({"type": "list", "share_with": "c", "pooling": "sum"}, "pooling: share_with takes it"),
        ({"type": "numeric", "encoder": "standard", "buckets": 5}, "buckets: it belongs to encoder quantile"),
        ({"type": "numeric", "normalize": True}, "normalize: it belongs to standard"),
        ({"type": "numeric", "training_only": {"default": "x"}}, "'x' is no value of the field"),
        ({"type": "categorical", "encoder": "identity", "buckets": 9, "training_only": {"default": -1}}, "no value of"),
        ({"type": "list", "training_only": {"default": 3}}, "3 is no value of the field"),
    ],
)
def test_what_a_field_cannot_be_is_told(field: dict[str, Any], told: str) -> None:
    fields = [*FIELDS.values(), {"name": "odd", **field}]
    with pytest.raises(InputError, match=told):
        validate(Schema, {"name": "t", "label": {"column": "y"}, "fields": fields}, "schema t.yaml")


def test_a_schema_of_values_alone_is_refused() -> None:
    with pytest.raises(InputError, match="at least one must have ids"):
        validate(Schema, {"name": "t", "label": {"column": "y"}, "fields": [FIELDS["v"]]}, "schema t.yaml")
