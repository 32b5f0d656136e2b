"""The routes over a real engine: every answer's body and status, without a server around it."""

import json
import logging
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from starlette.testclient import TestClient

from features.dataset import PreparedDataset
from serving.api.routes import Routes
from serving.bundle import Bundle
from serving.ranking.engine import RankingEngine
from serving.settings import ServeSettings
from tests.serving.parts import parts_of

CONTEXT = {"user_id": "13", "age": 47, "gender": "M", "occupation": "educator"}
CANDIDATES: dict[str, list[Any]] = {
    "item_id": ["50", "181", 1, None],
    "title": ["Star Wars", "Return of the Jedi", "Toy Story", None],
    "year": [1977, 1983.0, 1995, None],
    "genres": [["Action", "Sci-Fi"], "Action Sci-Fi", [], None],
}
ROWS = [dict(zip(CANDIDATES, values, strict=True)) for values in zip(*CANDIDATES.values(), strict=True)]


@pytest.fixture(scope="module")
def client(bundle: Bundle) -> TestClient:
    app = Routes(parts_of(RankingEngine(bundle, "7"))).app
    return TestClient(app)


def error(client: TestClient, path: str, body: Any, status: int) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == {"code", "message", "location"}
    found: dict[str, Any] = answer.json()["error"]
    return found


def test_rank_is_best_first_and_equals_predict(client: TestClient) -> None:
    ranked = client.post("/rank", json={"context": CONTEXT, "candidates": CANDIDATES}).json()
    assert ranked["model"] == {"name": "movielens-ranker", "version": "7"}
    rows = [row | CONTEXT for row in ROWS]
    scores = client.post("/predict", json={"rows": rows}).json()["scores"]
    expected = sorted(range(4), key=lambda i: -scores[i])
    assert [item["index"] for item in ranked["items"]] == expected
    assert [item["score"] for item in ranked["items"]] == pytest.approx([scores[i] for i in expected], abs=1e-6)


def test_columns_and_rows_are_the_same(client: TestClient) -> None:
    by_columns = client.post("/rank", json={"context": CONTEXT, "candidates": CANDIDATES}).json()
    by_rows = client.post("/rank", json={"context": CONTEXT, "candidates": ROWS}).json()
    assert by_columns == by_rows


def test_any_field_may_come_with_the_candidates(client: TestClient) -> None:
    rows = [row | CONTEXT for row in ROWS]
    assert (
        client.post("/rank", json={"candidates": rows}).json()
        == client.post("/rank", json={"context": CONTEXT, "candidates": ROWS}).json()
    )


def test_top_k_and_ties_in_the_order_of_the_request(client: TestClient) -> None:
    same = {name: [values[0]] * 5 for name, values in CANDIDATES.items()}
    items = client.post("/rank", json={"context": CONTEXT, "candidates": same, "top_k": 3}).json()["items"]
    assert [item["index"] for item in items] == [0, 1, 2]


def test_scores_equal_the_offline_scorers(
    client: TestClient, dataset: PreparedDataset, bundle: Bundle, raw_rows: Any
) -> None:
    table = dataset.split("test").slice(0, 300)
    flat = pl.read_parquet(raw_rows)
    lines = [line - 1 for line in table["_line"].to_pylist()]
    rows = flat[lines].select(dataset.pipeline.names).with_columns(pl.col("year").cast(pl.Int64))
    online = client.post("/predict", json={"rows": rows.to_dicts()}).json()["scores"]
    np.testing.assert_allclose(online, bundle.scorer.score_encoded(table), rtol=0, atol=1e-6)


def test_model_tells_version_metrics_and_schema(client: TestClient, bundle: Bundle) -> None:
    answer = client.get("/model").json()
    assert answer["metrics"] == bundle.manifest["metrics"]
    assert [field["name"] for field in answer["schema"]["fields"]] == list(bundle.pipeline.names)


@pytest.mark.parametrize(
    ("change", "code", "location"),
    [
        ({"candidates": CANDIDATES | {"colour": ["red"] * 4}}, "unknown_field", "candidates.colour"),
        ({"candidates": [*ROWS[:3], ROWS[3] | {"colour": "red"}]}, "unknown_field", "candidates[3].colour"),
        ({"candidates": {k: v for k, v in CANDIDATES.items() if k != "year"}}, "missing_field", "candidates.year"),
        ({"candidates": [ROWS[0], {"item_id": "1"}]}, "missing_field", "candidates[1].title"),
        ({"context": {k: v for k, v in CONTEXT.items() if k != "age"}}, "missing_field", "candidates.age"),
        ({"context": CONTEXT | {"year": 1990}}, "field_twice", "candidates.year"),
        ({"context": CONTEXT | {"shoe": 42}}, "unknown_field", "context.shoe"),
        ({"context": CONTEXT | {"age": "47"}}, "wrong_type", "context.age"),
        ({"context": CONTEXT | {"age": True}}, "wrong_type", "context.age"),
        ({"context": CONTEXT | {"gender": 1.5}}, "wrong_type", "context.gender"),
        ({"context": CONTEXT | {"gender": ["M"]}}, "wrong_type", "context.gender"),
        ({"context": CONTEXT | {"gender": {"is": "M"}}}, "wrong_type", "context.gender"),
        ({"context": [1]}, "wrong_type", "context"),
        ({"candidates": CANDIDATES | {"year": [1, 2, "3", 4]}}, "wrong_type", "candidates.year[2]"),
        ({"candidates": CANDIDATES | {"genres": [["a"], ["b", 1.5], [], []]}}, "wrong_type", "candidates.genres[1][1]"),
        ({"candidates": CANDIDATES | {"genres": [1, 2, 3, 4]}}, "wrong_type", "candidates.genres[0]"),
        ({"candidates": CANDIDATES | {"year": [1, 2]}}, "ragged_columns", "candidates.year"),
        ({"candidates": CANDIDATES | {"year": 1977}}, "wrong_type", "candidates.year"),
        ({"candidates": [ROWS[0], 5]}, "wrong_type", "candidates[1]"),
        ({"candidates": "all"}, "wrong_type", "candidates"),
        ({"candidates": []}, "no_rows", "candidates"),
        ({"candidates": {}}, "no_rows", "candidates"),
        ({"candidates": {name: [] for name in CANDIDATES}}, "no_rows", "candidates"),
        ({"candidates": [{}, {}]}, "no_rows", "candidates"),
        ({"top_k": 0}, "wrong_type", "top_k"),
        ({"top_k": 2.0}, "wrong_type", "top_k"),
        ({"top_k": True}, "wrong_type", "top_k"),
        ({"limit": 3}, "unknown_key", "limit"),
    ],
)
def test_a_wrong_request_is_422_with_the_place(
    client: TestClient, change: dict[str, Any], code: str, location: str
) -> None:
    found = error(client, "/rank", {"context": CONTEXT, "candidates": CANDIDATES} | change, 422)
    assert (found["code"], found["location"]) == (code, location)


def test_no_candidates_key(client: TestClient) -> None:
    assert error(client, "/rank", {"context": CONTEXT}, 422)["code"] == "missing_key"
    assert error(client, "/predict", [ROWS[0]], 422)["code"] == "wrong_type"


def test_too_many_candidates(client: TestClient) -> None:
    many = {name: [values[0]] * 5001 for name, values in CANDIDATES.items()}
    found = error(client, "/rank", {"context": CONTEXT, "candidates": many}, 413)
    assert found["code"] == "too_many_rows"
    wrong = error(client, "/rank", {"context": CONTEXT, "candidates": many | {"year": ["x"] * 5001}}, 413)
    assert wrong["code"] == "too_many_rows"
    most = {name: values[:5000] for name, values in many.items()}
    assert client.post("/rank", json={"context": CONTEXT, "candidates": most}).status_code == 200


@pytest.mark.parametrize(
    "text", ["", "{", '{"context": {"age": NaN}}', '{"candidates": Infinity}', "\xff", '{"a": 1}}']
)
def test_what_is_not_json_is_400(client: TestClient, text: str) -> None:
    answer = client.post("/rank", content=text.encode("latin-1"), headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "not_json"


def test_a_number_too_large_for_a_double_is_refused(client: TestClient) -> None:
    body = json.dumps({"context": CONTEXT, "candidates": CANDIDATES}).replace("47", "1e999")
    answer = client.post("/rank", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert set(answer.json()["error"]) == {"code", "message", "location"}


def test_numbers_of_any_size_and_kind_go_together(client: TestClient) -> None:
    years = [2.5, 1152921504606846977, 9223372036854775808, 1]
    body = {"context": CONTEXT, "candidates": CANDIDATES | {"year": years}}
    assert client.post("/rank", json=body).status_code == 200


def test_huge_integers_are_ids_like_any_other(client: TestClient) -> None:
    body = {"context": CONTEXT | {"user_id": 2**63 + 5}, "candidates": CANDIDATES}
    assert client.post("/rank", json=body).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-python-pickle", "multipart/form-data", ""])
def test_other_content_types_are_415(client: TestClient, kind: str) -> None:
    answer = client.post("/rank", content=b"{}", headers={"content-type": kind})
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "content_type"


def test_a_body_above_the_limit_is_413(client: TestClient) -> None:
    answer = client.post("/rank", content=b" " * (16 * 2**20 + 1), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_unknown_paths_and_methods_have_the_same_body(client: TestClient) -> None:
    assert client.get("/ranks").json()["error"]["code"] == "not_found"
    answer = client.get("/rank")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert answer.json()["error"]["code"] == "method_not_allowed"


def test_a_failure_inside_is_500_without_details(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    path, value = "/".join(["secret", "path"]), "-".join(["secret", "value"])  # not as they stand in code

    class Broken(RankingEngine):
        def rank(self, *_: Any) -> Any:
            try:
                pa.array([value]).cast(pa.int8())  # Arrow quotes it
            except pa.ArrowInvalid as error:
                raise RuntimeError(path) from error

    for settings in (ServeSettings(), ServeSettings(log_requests=True)):
        caplog.clear()
        app = Routes(parts_of(Broken(bundle, "1"), settings)).app
        answer = TestClient(app).post("/rank", json={"context": CONTEXT, "candidates": CANDIDATES})
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal"
        assert "secret" not in answer.text
        (told,) = (record for record in caplog.records if record.levelname == "ERROR")
        text = logging.Formatter().format(told)
        assert text.startswith("request : /rank failed\n")
        assert all(word in text for word in ("in rank\n", "RuntimeError", "ArrowInvalid", "test_routes.py"))
        assert (value in text) == (path in text) == settings.log_requests


def test_documented_examples_are_answered(client: TestClient) -> None:
    docs = client.get("/docs.json").json()
    assert {"/rank", "/predict", "/model", "/livez", "/readyz", "/metrics"} <= docs["paths"].keys()
    for path in ("/rank", "/predict"):
        example = docs["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert client.post(path, json=example).status_code == 200, example


def test_what_is_fetched_where_left_out_is_documented(bundle: Bundle) -> None:
    class Empty:
        def fill(self, context: Any, columns: Any) -> None: ...
        def close(self) -> None: ...

    store = {"kind": "parquet", "url": "users.parquet", "key": "user_id", "fields": ["age", "gender"]}
    settings = ServeSettings.model_validate({"store": store})
    app = Routes(parts_of(RankingEngine(bundle, "1"), settings, filler=Empty())).app
    paths = TestClient(app).get("/docs.json").json()["paths"]
    for path in ("/rank", "/predict"):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body["description"] == "Fetched where left out: age, gender"
