"""A bundle with every kind of field: what its scores are, offline and through the routes.

Legend: N rows, F fields, d embedding width.
"""

import json
import math
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from safetensors.numpy import load_file
from starlette.testclient import TestClient

from features.errors import InputError
from features.files import sha256_file
from features.schema import Schema, load_schema
from serving.api.routes import Routes
from serving.bundle import Bundle, load_bundle, tables_of
from serving.ranking.engine import RankingEngine
from tests.serving.every_kind import (
    CANDIDATES,
    CONTEXT,
    PIPELINE,
    RATE,
    SCHEMA,
    TIME,
    VALUES,
    rows_at,
    write_every_kind,
)
from tests.serving.parts import parts_of


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(write_every_kind(tmp_path_factory.mktemp("every") / "bundle"))


@pytest.fixture(scope="module")
def client(bundle: Bundle) -> TestClient:
    app = Routes(parts_of(RankingEngine(bundle, "1"))).app
    return TestClient(app)


def expected_scores(path: Path, encoded: pa.Table) -> np.ndarray:
    """σ(logit + ln rate) in fp64 from the bundle's files and encoded rows; what a request cannot say is set by hand."""
    dense = {k: v.astype(np.float64) for k, v in load_file(path / "members/00/network.safetensors").items()}
    tables = [load_file(file)["weight"].astype(np.float64) for file in sorted(path.glob("members/00/embeddings/*"))]
    owners = [field.name for field in SCHEMA.fields if field.name not in [*VALUES, "liked"]]
    assert len(tables) == len(owners)
    fixed = {"position": 2 + 1, "hour": 2 + 16, "weekday": 2 + 0}
    rows = []
    for row in encoded.to_pylist():
        embedded = []
        for field in SCHEMA.fields:
            if field.name in VALUES:
                v = VALUES.index(field.name)
                x = (2.5 - 1.0) / 0.5 if field.name == "delay" else row[field.name]
                value, missing = (0.0, 1.0) if x is None else (x, 0.0)
                embedded.append(value * dense["values.scale"][v] + dense["values.bias"][v])
                embedded[-1] = embedded[-1] + missing * dense["values.missing"][v]
            else:
                table = tables[owners.index("user" if field.name == "liked" else field.name)]
                ids = np.atleast_1d(fixed.get(field.name, row[field.name]))
                embedded.append(table[ids].sum(0) if field.name == "codes" else table[ids].mean(0))
        rows.append(np.stack(embedded))
    emb_NFd = np.stack(rows)
    raw = emb_NFd.reshape(len(rows), -1)
    normed_NFd = emb_NFd.copy()
    fields = [f for f, field in enumerate(SCHEMA.fields) if field.name not in ("price", "share", "delay")]
    normed_NFd[:, fields] = layer_norm(emb_NFd[:, fields]) * dense["embedding_norm.norm.weight"]
    normed_NFd[:, fields] += dense["embedding_norm.norm.bias"]
    mask = np.maximum(raw @ dense["blocks.0.mask.aggregate.weight"].T + dense["blocks.0.mask.aggregate.bias"], 0)
    mask = mask @ dense["blocks.0.mask.project.weight"].T + dense["blocks.0.mask.project.bias"]
    hidden = layer_norm((mask * normed_NFd.reshape(len(rows), -1)) @ dense["blocks.0.linear.weight"].T)
    hidden = np.maximum(hidden * dense["blocks.0.norm.weight"] + dense["blocks.0.norm.bias"], 0)
    logit = hidden @ dense["logit.weight"][0] + dense["logit.bias"]
    return 1 / (1 + np.exp(-(logit + math.log(RATE))))


def layer_norm(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def test_scores_are_those_of_the_definition(client: TestClient, bundle: Bundle) -> None:
    when = datetime(2024, 5, 5, 16, 30, tzinfo=UTC)
    raw = {**{name: [row[name] for row in rows_at(None)] for name in [*CANDIDATES, *CONTEXT]}, "seen": [when] * 3}
    raw |= {"item": ["x", "17", None], "slot": ["3", "7", "99"], "codes": [["0", "5"], ["2"], []]}
    raw |= {"genres": [["war", "drama"], ["war"], ["opera"]]}
    expected = expected_scores(bundle.path, bundle.pipeline.encode(raw))
    assert expected.std() > 0.02
    answer = client.post("/rank", json={"context": CONTEXT, "candidates": CANDIDATES, "time": TIME}).json()
    order = sorted(range(3), key=lambda i: -expected[i])
    assert [item["index"] for item in answer["items"]] == order
    # fp32 against fp64 over a mask of 64 products
    np.testing.assert_allclose([item["score"] for item in answer["items"]], expected[order], rtol=0, atol=2e-6)
    for rows in (raw, pd.DataFrame(raw | {"seen": [when.replace(tzinfo=None)] * 3})):
        np.testing.assert_allclose(bundle.scorer.score(rows), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("time", [TIME, "2024-05-05 16:30", 1714926600, 1714926600.0, "1714926600"])
def test_rank_and_predict_agree_on_every_way_to_write_a_time(client: TestClient, time: Any) -> None:
    ranked = client.post("/rank", json={"context": CONTEXT, "candidates": CANDIDATES, "time": time}).json()["items"]
    scores = client.post("/predict", json={"rows": rows_at(time)}).json()["scores"]
    expected = client.post("/predict", json={"rows": rows_at(TIME)}).json()["scores"]
    assert scores == expected
    assert {item["index"]: item["score"] for item in ranked} == pytest.approx(dict(enumerate(scores)), abs=1e-6)


def test_time_is_now_by_default_and_null_is_missing(client: TestClient, bundle: Bundle) -> None:
    def ranked(**time: str) -> Any:
        return client.post("/rank", json={"context": CONTEXT, "candidates": CANDIDATES, **time}).json()["items"]

    before, found, after = datetime.now(UTC), ranked(), datetime.now(UTC)
    assert found in (ranked(time=before.isoformat()), ranked(time=after.isoformat()))
    missing = client.post("/predict", json={"rows": rows_at(None)}).json()["scores"]
    empty = client.post("/predict", json={"rows": rows_at("")}).json()["scores"]
    assert missing == empty != client.post("/predict", json={"rows": rows_at(TIME)}).json()["scores"]


def test_training_only_values_do_not_count(bundle: Bundle) -> None:
    rows = pa.table({name: [None] for name in PIPELINE.names if name not in ("user_x_genre", "hour", "weekday")})
    rows = rows.append_column("seen", pa.array([datetime(2024, 5, 5, tzinfo=UTC)]))
    shown = rows.set_column(rows.column_names.index("position"), "position", pa.array(["7"]))
    shown = shown.set_column(shown.column_names.index("delay"), "delay", pa.array([-4.0]))
    assert bundle.pipeline.encode(shown)["position"].to_pylist() == [9]
    without = rows.drop_columns(["position", "delay"])
    np.testing.assert_array_equal(bundle.scorer.score(shown), bundle.scorer.score(without))


def test_files_of_the_bundle(bundle: Bundle) -> None:
    assert len(list(bundle.path.glob("members/00/embeddings/*"))) == 11
    assert bundle.manifest["format"] == 3
    assert bundle.manifest["sampling_rate"] == RATE
    assert load_schema(bundle.path / "schema.yaml") == SCHEMA
    assert yaml.safe_load((bundle.path / "schema.yaml").read_text())["fields"][3]["from"] == "seen"
    user = next(table for table in tables_of(PIPELINE) if table.name == "user")
    assert (user.features, user.rows, user.pooling) == (("liked", "user"), 5, "mean")


@pytest.mark.parametrize(("found", "advice"), [(1, "train the model anew"), (4, "update it")])
def test_other_formats_are_refused(bundle: Bundle, tmp_path: Path, found: int, advice: str) -> None:
    copy = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    (copy / "manifest.json").write_text(json.dumps(bundle.manifest | {"format": found}))
    (copy / "manifest.sha256").write_text(sha256_file(copy / "manifest.json"))
    with pytest.raises(InputError, match=f"has format {found}; this program reads 3 and 2: {advice}"):
        load_bundle(copy)


def test_golden_rows_reach_missing_unseen_and_known_values(bundle: Bundle) -> None:
    rows = json.loads((bundle.path / "golden.json").read_text())["rows"]
    assert set(rows) == {*CANDIDATES, *CONTEXT, "seen"}
    assert all(values[0] is None for values in rows.values())
    rows["seen"] = [None if s is None else datetime.fromtimestamp(s, UTC) for s in rows["seen"]]
    encoded = bundle.pipeline.encode(rows).to_pydict()
    assert encoded["user"][:2] == encoded["slot"][:2] == [0, 1]
    assert encoded["liked"][:2] == encoded["codes"][:2] == [[0], [1]]
    for name in ("user", "slot", "age", "clicks", "hour", "weekday"):
        assert len(set(encoded[name][2:])) > 1, name
        assert min(encoded[name][2:]) >= 2, name
    for name in ("price", "income"):
        assert min(encoded[name][1:]) < 0 < max(encoded[name][1:]), name


def test_model_and_documentation_tell_what_is_sent(client: TestClient) -> None:
    schema = client.get("/model").json()["schema"]
    assert Schema.model_validate(schema) == SCHEMA
    paths = client.get("/docs.json").json()["paths"]
    bodies = {path: paths[path]["post"]["requestBody"]["content"]["application/json"] for path in ("/rank", "/predict")}
    for path, body in bodies.items():
        assert client.post(path, json=body["example"]).status_code == 200, client.post(path, json=body["example"]).text
    assert set(bodies["/rank"]["schema"]["properties"]) == {"context", "candidates", "top_k", "time"}
    assert set(bodies["/rank"]["schema"]["properties"]["context"]["properties"]) == {*CANDIDATES, *CONTEXT}
    columns = bodies["/predict"]["schema"]["properties"]["rows"]["oneOf"][0]["properties"]
    assert set(columns) == {*CANDIDATES, *CONTEXT, "seen"}
    assert {"type": "integer", "minimum": 0, "maximum": 10**18 - 1} in columns["slot"]["items"]["oneOf"]
    assert columns["user"]["items"]["oneOf"][0]["maxLength"] == 4096


def test_values_that_only_the_encoders_refuse_are_422(client: TestClient) -> None:
    answer = client.post("/rank", json={"context": CONTEXT | {"user": "a\0b"}, "candidates": CANDIDATES})
    assert answer.status_code == 422
    error = {"code": "bad_value", "message": "the value contains a NUL", "location": "context.user"}
    assert answer.json() == {"error": error}
