"""What clients may send, by schema alone; and columns that are a field and a date field's input at once."""

import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from starlette.testclient import TestClient

from features.encoders import DatePart, Hash, Vocabulary
from features.pipeline import FeaturePipeline
from features.schema import Schema
from masknet.config import MaskNetConfig
from masknet.model import MaskNet
from serving.api.errors import ApiError
from serving.api.requests import parse_predict, parse_rank
from serving.api.routes import Routes
from serving.bundle import fields_of, load_bundle, tables_of, write_bundle
from serving.members import Member
from serving.ranking.engine import RankingEngine
from tests.serving.parts import parts_of

SCHEMA = Schema.model_validate(
    {
        "name": "small",
        "label": {"column": "click"},
        "context": ["user"],
        "fields": [
            {"name": "user", "type": "categorical"},
            {"name": "slot", "type": "categorical", "encoder": "identity", "buckets": 8},
            {"name": "codes", "type": "list", "encoder": "identity", "buckets": 8, "separator": " "},
            {"name": "also", "type": "list", "share_with": "slot"},
            {"name": "hour", "type": "date", "from": "seen", "part": "hour"},
            {"name": "pair", "type": "cross", "of": ["user", "slot"], "buckets": 9},
            {"name": "position", "type": "numeric", "encoder": "log1p", "training_only": {"default": 0}},
        ],
    }
)
ROW: dict[str, Any] = {"slot": 3, "codes": ["1", 2], "also": [7], "user": None, "seen": "2024-05-05T16:30:00Z"}
CONTEXT = {"user": "ann"}
CANDIDATE = {name: ROW[name] for name in ("slot", "codes", "also")}


def rank(**change: Any) -> Any:
    return parse_rank(json.dumps({"context": CONTEXT, "candidates": [CANDIDATE], **change}).encode(), SCHEMA)


def predict(**change: Any) -> Any:
    return parse_predict(json.dumps({"rows": [ROW, ROW | change]}).encode(), SCHEMA)


def test_good_requests() -> None:
    assert rank().time is None
    assert rank().candidates == {"slot": ["3"], "codes": [["1", "2"]], "also": [["7"]]}
    assert rank(time=0).time == datetime(1970, 1, 1, tzinfo=UTC)
    assert rank(time="2024-05-05T18:30:00.25+02:00").time == datetime(2024, 5, 5, 16, 30, 0, 250000, tzinfo=UTC)
    assert rank(time="2024-05-05").time == datetime(2024, 5, 5, tzinfo=UTC)
    assert rank(time="-1.5").time == datetime(1969, 12, 31, 23, 59, 58, 500000, tzinfo=UTC)
    assert predict(seen=None, slot="", codes="4 5") == {
        "slot": ["3", ""],
        "codes": [["1", "2"], ["4", "5"]],
        "also": [["7"], ["7"]],
        "user": [None, None],
        "seen": [datetime(2024, 5, 5, 16, 30, tzinfo=UTC), None],
    }


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (True, "wrong_type"),
        (None, "wrong_type"),
        ([0], "wrong_type"),
        ({"at": 0}, "wrong_type"),
        ("", "bad_value"),
        ("soon", "bad_value"),
        ("nan", "bad_value"),
        ("1e400", "bad_value"),
        ("2024-13-01", "bad_value"),
        (1e300, "bad_value"),
        (-1e12, "bad_value"),
        ("0001-01-01T00:00:00+09:00", "bad_value"),
    ],
)
def test_what_is_no_time(value: Any, code: str) -> None:
    with pytest.raises(ApiError) as error:
        rank(time=value)
    assert (error.value.status, error.value.code, error.value.location) == (422, code, "time")
    if value not in (None, ""):
        with pytest.raises(ApiError) as error:
            predict(seen=value)
        assert (error.value.code, error.value.location) == (code, "rows[1].seen")


@pytest.mark.parametrize("name", ["hour", "pair", "position", "seen"])
def test_what_clients_do_not_send(name: str) -> None:
    for place, change in [("context", {"context": {name: 1}}), ("candidates[0]", {"candidates": [{name: 1}]})]:
        with pytest.raises(ApiError, match="is not sent by clients; they send user, slot, codes, also") as error:
            rank(**change)
        assert (error.value.code, error.value.location) == ("unknown_field", f"{place}.{name}")
    if name != "seen":
        with pytest.raises(ApiError, match="is not sent by clients") as error:
            predict(**{name: 1})
        assert error.value.location == f"rows[1].{name}"


def test_a_column_of_times_is_required() -> None:
    with pytest.raises(ApiError, match="'seen' is missing") as error:
        parse_predict(json.dumps({"rows": [{k: v for k, v in ROW.items() if k != "seen"}]}).encode(), SCHEMA)
    assert (error.value.code, error.value.location) == ("missing_field", "rows.seen")


@pytest.mark.parametrize(
    ("change", "code", "location"),
    [
        ({"slot": -1}, "bad_value", "rows[1].slot"),
        ({"slot": "x"}, "bad_value", "rows[1].slot"),
        ({"slot": "1٣"}, "bad_value", "rows[1].slot"),
        ({"slot": 10**18}, "bad_value", "rows[1].slot"),
        ({"slot": 1.0}, "wrong_type", "rows[1].slot"),
        ({"slot": True}, "wrong_type", "rows[1].slot"),
        ({"codes": [1, "b"]}, "bad_value", "rows[1].codes[1]"),
        ({"codes": "1 b"}, "bad_value", "rows[1].codes"),
        ({"also": [-3]}, "bad_value", "rows[1].also[0]"),
    ],
)
def test_identity_takes_whole_numbers(change: dict[str, Any], code: str, location: str) -> None:
    with pytest.raises(ApiError) as error:
        predict(**change)
    assert (error.value.code, error.value.location) == (code, location)


DATED = Schema.model_validate(
    {
        "name": "dated",
        "label": {"column": "click"},
        "context": ["when"],
        "fields": [
            {"name": "when", "type": "categorical"},
            {"name": "item", "type": "categorical", "encoder": "hash", "buckets": 9},
            {"name": "hour", "type": "date", "from": "when", "part": "hour", "format": "%y%m%d%H"},
        ],
    }
)


@pytest.fixture(scope="module")
def dated(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """A model whose context has a field that a date field reads too."""
    encoders = {
        "when": Vocabulary(pa.array(["14102100", "14102113"])),
        "item": Hash(9),
        "hour": DatePart(24, "hour", "UTC"),
    }
    pipeline = FeaturePipeline.build(DATED.fields, encoders)
    config = MaskNetConfig(embedding_dim=4, blocks=1, block_width=6, head=())
    torch.manual_seed(0)
    network = MaskNet(config, tables_of(pipeline), fields_of(pipeline)).dense_state()
    tables = {table.name: torch.randn(table.rows, 4) for table in tables_of(pipeline)}
    path = tmp_path_factory.mktemp("dated") / "bundle"
    rest = {"schema": DATED, "pipeline": pipeline, "members": [Member(network, tables)], "sampling_rate": 1.0}
    write_bundle(path, name="dated", config=config, run_id=None, evaluate=lambda scorer: {}, **rest)
    app = Routes(parts_of(RankingEngine(load_bundle(path), "1"))).app
    return TestClient(app)


def test_a_field_that_holds_the_time_counts_before_the_requests_time(dated: TestClient) -> None:
    body = {"context": {"when": "14102113"}, "candidates": {"item": ["a", "b"]}}
    items = dated.post("/rank", json=body).json()["items"]
    assert items == dated.post("/rank", json=body | {"time": 0}).json()["items"]
    scores = dated.post("/predict", json={"rows": {"when": ["14102113"] * 2, "item": ["a", "b"]}}).json()["scores"]
    assert {item["index"]: item["score"] for item in items} == pytest.approx(dict(enumerate(scores)), abs=1e-6)
    midnight = dated.post("/predict", json={"rows": {"when": ["14102100"] * 2, "item": ["a", "b"]}}).json()["scores"]
    assert np.abs(np.subtract(midnight, scores)).min() > 1e-4
    wrong = dated.post("/rank", json=body | {"context": {"when": "noon"}})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (422, "bad_value")


def test_documented_examples_hold_times_in_the_fields_own_form(dated: TestClient) -> None:
    paths = dated.get("/docs.json").json()["paths"]
    for path in ("/rank", "/predict"):
        example = paths[path]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert "24050118" in json.dumps(example)
        assert dated.post(path, json=example).status_code == 200, example
