"""The model's configuration: what it accepts, and that what it refuses is named."""

from typing import Any

import pytest
from pydantic import ValidationError

from masknet.config import MaskNetConfig, NormConfig
from masknet.norms import NORMS


def errors_of(values: dict[str, Any]) -> list[tuple[tuple[int | str, ...], str]]:
    """Location and message of each thing refused."""
    with pytest.raises(ValidationError) as caught:
        MaskNetConfig.model_validate(values)
    return [(error["loc"], error["msg"]) for error in caught.value.errors()]


def test_defaults_are_the_papers() -> None:
    config = MaskNetConfig()
    assert (config.kind, config.blocks, config.block_width, config.reduction_ratio) == ("parallel", 3, 400, 2.0)
    assert config.embedding_norm == config.hidden_norm == NormConfig(name="layer", eps=1e-5)
    assert (config.head, config.dropout, config.activation) == ((400, 400), 0.0, "relu")
    assert (config.embedding_dropout, config.embedding_init) == (0.0, 0.01)


def test_unknown_key() -> None:
    assert errors_of({"block_widht": 400})[0][0] == ("block_widht",)


@pytest.mark.parametrize("slot", ["embedding_norm", "hidden_norm"])
@pytest.mark.parametrize("value", ["batchnorm", {"name": "batchnorm"}, "", "Layer"])
def test_unknown_norm_names_itself_and_the_known_ones(slot: str, value: str | dict[str, str]) -> None:
    [(location, message)] = errors_of({slot: value})
    assert location == (slot, "name")
    assert repr(value if isinstance(value, str) else value["name"]) in message
    assert "layer, rms, none" in message


@pytest.mark.parametrize(
    ("value", "location"),
    [
        ({"name": "layer", "epsilon": 1e-3}, ("hidden_norm",)),
        ({"eps": 1e-3}, ("hidden_norm", "name")),
        ({"name": "layer", "eps": 0}, ("hidden_norm", "eps")),
        ({"name": "rms", "eps": -1e-5}, ("hidden_norm", "eps")),
        ({"name": "rms", "eps": float("nan")}, ("hidden_norm", "eps")),
        (None, ("hidden_norm",)),
        (3, ("hidden_norm",)),
        (["layer"], ("hidden_norm",)),
    ],
    ids=str,
)
def test_bad_norm_slot(value: object, location: tuple[str, ...]) -> None:
    assert [found for found, _ in errors_of({"hidden_norm": value})] == [location]


@pytest.mark.parametrize("head", [(400, 400), (1,), None], ids=str)
def test_serial_with_a_head(head: tuple[int, ...] | None) -> None:
    values = {"kind": "serial"} if head is None else {"kind": "serial", "head": head}
    [(_, message)] = errors_of(values)
    assert "head must be []" in message


def test_serial_without_a_head() -> None:
    assert MaskNetConfig.model_validate({"kind": "serial", "head": []}).head == ()


def test_parallel_without_a_head() -> None:
    assert MaskNetConfig(kind="parallel", head=()).head == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "wide"),
        ("embedding_dim", 0),
        ("embedding_dim", -16),
        ("embedding_dim", 1.5),
        ("blocks", 0),
        ("block_width", 0),
        ("reduction_ratio", 0),
        ("reduction_ratio", -2.0),
        ("reduction_ratio", float("nan")),
        ("activation", "gelu"),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", float("nan")),
        ("embedding_dropout", 1.0),
        ("embedding_dropout", -0.1),
        ("embedding_init", 0),
        ("embedding_init", float("inf")),
        ("head", 400),
        ("blocks", None),
    ],
)
def test_bad_value(key: str, value: object) -> None:
    assert [location for location, _ in errors_of({key: value})] == [(key,)]


@pytest.mark.parametrize("width", [0, -4, "wide"])
def test_bad_width_in_the_head(width: object) -> None:
    assert [location for location, _ in errors_of({"head": [4, width]})] == [("head", 1)]


def test_every_mistake_is_reported_at_once() -> None:
    found = {location for location, _ in errors_of({"blocks": 0, "dropout": 2, "hidden_norm": "batchnorm", "widht": 1})}
    assert found == {("blocks",), ("dropout",), ("hidden_norm", "name"), ("widht",)}


@pytest.mark.parametrize("slot", ["embedding_norm", "hidden_norm"])
@pytest.mark.parametrize("name", NORMS)
def test_bare_name_and_mapping_are_the_same(slot: str, name: str) -> None:
    bare = MaskNetConfig.model_validate({slot: name})
    assert bare == MaskNetConfig.model_validate({slot: {"name": name}})
    assert bare == MaskNetConfig.model_validate({slot: {"name": name, "eps": NORMS[name].default_eps}})
    assert bare == MaskNetConfig.model_validate({slot: NormConfig(name=name)})
    assert bare != MaskNetConfig.model_validate({slot: {"name": name, "eps": 2e-3}})


@pytest.mark.parametrize("mode", ["python", "json"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"kind": "serial", "head": [], "embedding_norm": "none", "hidden_norm": {"name": "rms", "eps": 1e-6}},
        {"embedding_dim": 10, "blocks": 7, "head": [4, 6], "reduction_ratio": 0.2, "dropout": 0.5},
    ],
    ids=["defaults", "serial", "parallel"],
)
def test_dump_and_validate_round_trip(values: dict[str, Any], mode: str) -> None:
    config = MaskNetConfig.model_validate(values)
    assert MaskNetConfig.model_validate(config.model_dump(mode=mode)) == config
    assert MaskNetConfig.model_validate_json(config.model_dump_json()) == config


def test_is_frozen() -> None:
    config = MaskNetConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.blocks = 4
    with pytest.raises(ValidationError, match="frozen"):
        config.hidden_norm.eps = 1.0
