"""A served model that is sent `user_id` alone, and finds the user's other fields in a real Redis."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

from tests.serving.redis_server import Redis
from tests.serving.running import Service

pytestmark = pytest.mark.long
FETCHED = ["age", "gender", "occupation"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, raw_rows: Path) -> Iterator[Redis]:
    redis = Redis(tmp_path_factory.mktemp("redis"))
    redis.start()
    load(redis, raw_rows)
    yield redis
    redis.end()


def load(redis: Redis, raw_rows: Path) -> None:
    command = [sys.executable, "-m", "serving.store.load", str(raw_rows), "--url", redis.url, "--key", "user_id"]
    subprocess.run([*command, "--fields", ",".join(FETCHED), "--prefix", "u:"], check=True, timeout=60)


@pytest.fixture(scope="module")
def service(bundle_path: Path, server: Redis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    keys = {"kind": "redis", "url": server.url, "key": "user_id", "fields": FETCHED, "prefix": "u:", "timeout_ms": 200}
    home = tmp_path_factory.mktemp("service")
    (home / "serve.yaml").write_text(json.dumps({"store": keys}))
    with Service(home, str(bundle_path), "--config", "serve.yaml") as service:
        yield service


@pytest.fixture(scope="module")
def asked(raw_rows: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """A user with all fields, and films."""
    rows = pl.read_parquet(raw_rows).with_columns(pl.col("year").cast(pl.Int64))
    films = rows.unique("item_id", maintain_order=True).head(40)
    user = rows.select("user_id", *FETCHED).row(100, named=True)
    return user, films.select("item_id", "title", "year", "genres").to_dict(as_series=False)


def ranked(service: Service, context: dict[str, Any], films: dict[str, Any]) -> list[tuple[int, float]]:
    items = service.rank({"context": context, "candidates": films, "top_k": 40})["items"]
    return [(item["index"], item["score"]) for item in items]


def test_the_key_alone_ranks_as_all_fields_do_and_as_none_while_redis_is_away(
    service: Service, server: Redis, raw_rows: Path, asked: tuple[dict[str, Any], dict[str, list[Any]]]
) -> None:
    user, films = asked
    alone = {"user_id": user["user_id"]}
    whole, without = ranked(service, user, films), ranked(service, alone | dict.fromkeys(FETCHED), films)
    assert whole != without
    assert ranked(service, alone, films) == whole
    assert ranked(service, alone | {"age": user["age"]}, films) == whole
    assert ranked(service, alone | {"occupation": None}, films) not in (whole, without)
    server.end()
    for _ in range(20):
        assert ranked(service, alone, films) == without
    assert ranked(service, user, films) == whole
    assert service.metric("masknet_store_timeouts") >= 20
    server.start()
    load(server, raw_rows)
    deadline = time.monotonic() + 20
    while ranked(service, alone, films) != whole and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ranked(service, alone, films) == whole


def test_rows_are_completed_each_by_its_key(
    service: Service, raw_rows: Path, asked: tuple[dict[str, Any], dict[str, list[Any]]]
) -> None:
    rows = pl.read_parquet(raw_rows).with_columns(pl.col("year").cast(pl.Int64)).head(200)
    rows = rows.select("user_id", *FETCHED, "item_id", "title", "year", "genres")
    answers = []
    for frame in (rows, rows.drop(FETCHED)):
        sent = {"rows": frame.to_dict(as_series=False)}
        answer = httpx.post(f"{service.uri}/predict", json=sent, timeout=30)
        assert answer.status_code == 200, answer.text
        answers.append(answer.json()["scores"])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 100


def test_a_file_in_memory_completes_too(
    bundle_path: Path, raw_rows: Path, asked: tuple[dict[str, Any], dict[str, list[Any]]], tmp_path: Path
) -> None:
    user, films = asked
    keys = {"kind": "parquet", "url": str(raw_rows), "key": "user_id", "fields": FETCHED}
    (tmp_path / "serve.yaml").write_text(json.dumps({"store": keys, "limits": {"drain_seconds": 0}}))
    with Service(tmp_path, str(bundle_path), "--config", "serve.yaml") as service:
        whole = ranked(service, user, films)
        assert ranked(service, {"user_id": user["user_id"]}, films) == whole
        nobody: dict[str, Any] = {"user_id": "nobody"}
        missing = ranked(service, nobody | dict.fromkeys(FETCHED), films)
        assert ranked(service, nobody, films) == missing != whole
        service.wait_for(lambda: service.metric("masknet_store_missed_total") == 1)
