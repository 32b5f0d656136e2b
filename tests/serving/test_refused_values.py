"""Values that only the encoders or the network refuse: where they stand, and what becomes of their request or file."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from features.errors import InputError
from serving.api.routes import Routes
from serving.bundle import Bundle, load_bundle
from serving.calibration import Unscorable
from serving.ranking.engine import RankingEngine
from serving.scoring.files import Scored, score_files
from tests.serving.every_kind import CANDIDATES, CONTEXT, PLAIN, TIME, in_rows, rows_at, write_every_kind
from tests.serving.parts import parts_of
from tests.serving.running import ARROW, stream

LONG = "x" * 4097
WHEN = pd.Timestamp("2024-05-05 16:30")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(write_every_kind(tmp_path_factory.mktemp("every") / "bundle"))


@pytest.fixture(scope="module")
def client(bundle: Bundle) -> TestClient:
    return TestClient(Routes(parts_of(RankingEngine(bundle, "1"))).app)


def refused(client: TestClient, path: str, body: Any) -> tuple[int, str, str | None]:
    sent = {"content": body, "headers": {"content-type": ARROW}} if isinstance(body, bytes) else {"json": body}
    answer = client.post(path, **sent)
    error = answer.json()["error"]
    assert error["code"] == "bad_value"
    return answer.status_code, error["location"], error["message"]


@pytest.mark.parametrize("value", [1e25, -1e25, 1e39, 1e300, -math.nextafter(math.inf, 0)])
def test_numbers_beyond_fp32_are_422_of_their_row(client: TestClient, value: float) -> None:
    """They are finite, and the network makes NaN of them."""
    columns = PLAIN | {"price": [1.0, value, 2.0]}
    message = "the numbers of this row, or of the context, are too large to be scored"
    for candidates in (columns, in_rows(columns)):
        body = {"context": CONTEXT, "candidates": candidates, "top_k": 1}
        assert refused(client, "/rank", body) == (422, "candidates[1]", message)
    assert refused(client, "/rank", stream(columns, {"context": CONTEXT})) == (422, "candidates[1]", message)
    rows = rows_at(TIME)
    rows[2]["price"] = value
    assert refused(client, "/predict", {"rows": rows}) == (422, "rows[2]", message)
    whole = columns | {name: [kept] * 3 for name, kept in CONTEXT.items()} | {"seen": [TIME] * 3}
    assert refused(client, "/predict", stream(whole, {})) == (422, "rows[1]", message)


def test_large_numbers_that_can_be_scored_are(client: TestClient, bundle: Bundle) -> None:
    columns = PLAIN | {"price": [1e15, -1e15, 2.0], "income": [1e300, 1e39, 0.0], "share": [1e300, -1e300, 1.0]}
    answer = client.post("/rank", json={"context": CONTEXT, "candidates": columns, "time": TIME})
    expected = bundle.scorer.score([row | CONTEXT | {"seen": WHEN} for row in in_rows(columns)])
    found = {item["index"]: item["score"] for item in answer.json()["items"]}
    assert found == pytest.approx(dict(enumerate(expected.tolist())), abs=1e-6)


def test_the_engine_and_the_scorer_name_the_row(bundle: Bundle) -> None:
    engine = RankingEngine(bundle, "1")
    candidates = in_rows(PLAIN | {"price": [1.0, 1e30, None]})
    rows = [row | CONTEXT | {"seen": WHEN} for row in candidates]
    for score in (engine.predict, bundle.scorer.score):
        with pytest.raises(Unscorable, match=r"^row 1: its values are too large to be scored$") as error:
            score(rows)
        assert error.value.row == 1
    with pytest.raises(Unscorable, match=r"^row 1:"):  # though the two others would do
        engine.rank(CONTEXT, candidates, 1)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("item", LONG, "the value is longer than 4096 bytes"),
        ("item", "a\0b", "the value contains a NUL"),
        ("liked", ["ann", "a\0b"], "the value contains a NUL"),
        ("genres", ["é" * 2049], "the value is longer than 4096 bytes"),
        ("genres", f"war|{LONG}", "the value is longer than 4096 bytes"),
    ],
)
def test_text_that_cannot_be_encoded_is_located(client: TestClient, column: str, value: Any, message: str) -> None:
    columns = CANDIDATES | {column: [*CANDIDATES[column][:2], value]}
    body = {"context": CONTEXT, "candidates": columns}
    assert refused(client, "/rank", body) == (422, f"candidates.{column}[2]", message)
    body = {"context": CONTEXT, "candidates": in_rows(columns)}
    assert refused(client, "/rank", body) == (422, f"candidates[2].{column}", message)
    rows = rows_at(TIME)
    rows[1][column] = value
    assert refused(client, "/predict", {"rows": rows}) == (422, f"rows[1].{column}", message)
    whole = {name: [row[name] for row in rows] for name in rows[0]}
    assert refused(client, "/predict", {"rows": whole}) == (422, f"rows.{column}[1]", message)


def test_text_in_a_stream_or_a_context_is_located(client: TestClient) -> None:
    body = stream(PLAIN | {"item": ["a", "b\0", "c"]}, {"context": CONTEXT})
    assert refused(client, "/rank", body) == (422, "candidates.item[1]", "the value contains a NUL")
    for value in (LONG, "a\0b"):
        body = {"context": CONTEXT | {"user": value}, "candidates": CANDIDATES}
        assert refused(client, "/rank", body)[:2] == (422, "context.user")


def test_a_row_that_cannot_be_scored_is_set_aside(bundle: Bundle, tmp_path: Path) -> None:
    rows = pd.DataFrame([row | CONTEXT | {"seen": WHEN} for row in in_rows(PLAIN)] * 100)
    good = bundle.scorer.score(rows)
    rows.loc[[17, 230], "price"] = [1e30, -1e300]
    rows.loc[40, "item"] = "a\0b"  # bad before it is scored
    rows.to_parquet(tmp_path / "rows.parquet", row_group_size=64)
    large = "its values are too large to be scored"
    told = rf"3 of 300 rows are bad, .*: 2 rows like .*rows.parquet:18 {large}; 1 rows like"
    with pytest.raises(InputError, match=told):
        score_files(bundle, [str(tmp_path / "rows.parquet")], tmp_path / "out")
    again: dict[str, Any] = {"max_bad_rows": 0.01, "resume": True}
    assert score_files(bundle, [str(tmp_path / "rows.parquet")], tmp_path / "out", **again) == Scored(297, 3)
    scored = pq.read_table(tmp_path / "out")["score"].to_numpy()
    np.testing.assert_allclose(scored, np.delete(good, [17, 40, 230]), rtol=0, atol=1e-7)
    aside = pq.ParquetDataset(tmp_path / "out" / "_quarantine", ignore_prefixes=["."]).read().to_pylist()
    found = sorted((row["line"], row["column"], row["reason"]) for row in aside)
    assert found == [(18, "", large), (41, "item", found[1][2]), (231, "", large)]
    assert "contains a NUL" in found[1][2]
