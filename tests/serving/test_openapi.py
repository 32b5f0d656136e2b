"""The description of the routes: every error's code is in the one list, and every example is what it says."""

import ast
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

from serving.api.codes import CODES
from serving.api.errors import ApiError
from serving.api.routes import Routes
from serving.bundle import load_bundle
from serving.ranking.engine import RankingEngine
from tests.serving.every_kind import write_every_kind
from tests.serving.parts import parts_of

ROOT = Path(__file__).parent.parent.parent
JSON = "application/json"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    bundle = load_bundle(write_every_kind(tmp_path_factory.mktemp("every") / "bundle"))
    return TestClient(Routes(parts_of(RankingEngine(bundle, "1"), protected=True)).app)


@pytest.fixture(scope="module")
def docs(client: TestClient) -> Any:
    return client.get("/docs.json").json()


def plain(schema: Any) -> Any:
    """OpenAPI 3.0's schema as JSON Schema: `nullable` is its own word."""
    if isinstance(schema, list):
        return [plain(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: plain(part) for key, part in schema.items() if key != "nullable"}
    return {"anyOf": [{"type": "null"}, found]} if schema.get("nullable") else found


def test_every_error_in_the_code_is_on_the_list_with_its_status() -> None:
    seen: dict[str, int] = {}
    for file in (ROOT / "serving").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ApiError":
                values = [part.value for part in node.args[:2] if isinstance(part, ast.Constant)]
                if len(values) == 2:
                    seen[str(values[1])] = int(str(values[0]))
    assert len(seen) > 20
    assert {code: CODES[code].status for code in seen} == seen
    assert CODES.keys() - seen.keys() == {"bad_request"}  # BentoML's own, by serving.api.gate
    with pytest.raises(AssertionError):
        ApiError(422, "bad_vlaue", "")


def test_every_status_has_an_example_of_each_of_its_codes(docs: Any) -> None:
    error = docs["components"]["schemas"]["Error"]
    seen = set()
    for path, method in [("/rank", "post"), ("/predict", "post"), ("/model", "get"), ("/readyz", "get")]:
        for status, answer in docs["paths"][path][method]["responses"].items():
            if status == "200":
                continue
            examples = answer["content"][JSON]["examples"]
            assert examples.keys() == {code for code, refusal in CODES.items() if str(refusal.status) == status}
            for code, example in examples.items():
                jsonschema.validate(example["value"], plain(error))
                assert example["value"]["error"]["code"] == code
            seen |= examples.keys()
    assert seen == CODES.keys() - {"not_found"}  # a path that there is not has no description
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"error": {"code": "other", "message": "", "location": None}}, plain(error))


def test_answers_and_their_examples_are_of_the_described_form(client: TestClient, docs: Any) -> None:
    for path, method in [("/rank", "post"), ("/predict", "post"), ("/model", "get")]:
        operation = docs["paths"][path][method]
        described = operation["responses"]["200"]["content"][JSON]
        body = operation.get("requestBody", {}).get("content", {}).get(JSON, {})
        if body:
            jsonschema.validate(body["example"], plain(body["schema"]))
        answer = client.request(method, path, json=body.get("example")).json()
        for found in (answer, described["example"]):
            jsonschema.validate(found, plain(described["schema"]))
        assert described["example"]["model"] == answer["model"] == {"name": "every", "version": "1"}


def test_headers_of_errors_are_described(docs: Any) -> None:
    answers = docs["paths"]["/rank"]["post"]["responses"]
    named = {status: set(answer["headers"]) - {"x-request-id"} for status, answer in answers.items()}
    assert named.pop("401") == {"WWW-Authenticate"}
    assert named.pop("405") == {"Allow"}
    assert named.pop("429") == named.pop("503") == {"Retry-After"}
    assert not any(named.values())


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("slot", [0, 10**18 - 1, "999999999999999999", "7.0", ""], [10**18, -1, "-1", "1" * 19, 1.5]),
        ("user", ["", "x" * 4096, 2**64 - 1, -(2**63)], ["x" * 4097, 2**64, 1.5, True]),
        ("price", [0, -1.5, 10**15], ["1", True]),
        ("codes", [[], [1, "2"], None], ["1", [None], [10**18]]),
        ("genres", ["a|b", ["a"], None], [1, ["x" * 4097]]),
    ],
)
def test_bounds_of_values_are_those_that_hold(
    client: TestClient, docs: Any, field: str, good: list[Any], bad: list[Any]
) -> None:
    body = docs["paths"]["/predict"]["post"]["requestBody"]["content"][JSON]
    (row,) = body["example"]["rows"]
    for values, status in ((good, 200), (bad, 422)):
        for value in values:
            sent = {"rows": [row | {field: value}]}
            assert client.post("/predict", json=sent).status_code == status, value
            if status == 200:
                jsonschema.validate(sent, plain(body["schema"]))
            else:
                with pytest.raises(jsonschema.ValidationError):
                    jsonschema.validate(sent, plain(body["schema"]))
