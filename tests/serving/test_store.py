"""Field values fetched by key: from a Parquet file, and from a real Redis that is killed and comes back."""

import logging
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import pandas as pd
import pytest

from features.errors import InputError
from features.schema import Schema
from serving.settings import Store
from serving.store.base import StoreDown
from serving.store.breaker import Breaker
from serving.store.fill import ChampionFiller, Filler
from serving.store.parquet_store import ParquetStore
from tests.serving.redis_server import Redis

SCHEMA = Schema.model_validate(
    {
        "name": "s",
        "label": {"column": "click"},
        "context": ["user", "age", "tags"],
        "fields": [
            {"name": "user", "type": "categorical"},
            {"name": "age", "type": "numeric"},
            {"name": "tags", "type": "list", "separator": "|"},
            {"name": "item", "type": "categorical", "encoder": "identity", "buckets": 100},
            {"name": "brand", "type": "categorical"},
            {"name": "hour", "type": "date", "from": "at", "part": "hour"},
        ],
    }
)
ROWS = {"7": {"age": 31.0, "tags": ["a", "b"]}, "8": {"age": None, "tags": ["c"]}}


class Memory:
    """A store of given rows, which notes what it was asked for."""

    def __init__(self, rows: Mapping[str, Any], down: bool = False) -> None:
        self.rows, self.down, self.asked = rows, down, list[list[str]]()

    def fetch(self, keys: Sequence[str]) -> Sequence[Mapping[str, Any] | None]:
        self.asked.append(list(keys))
        if self.down:
            raise StoreDown
        return [self.rows.get(key) for key in keys]

    def close(self) -> None:
        pass


class Told:
    """Notes what it is told of fetches."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool]] = []

    def fetch(self, missed: int, timed_out: bool = False) -> None:
        self.calls.append((missed, timed_out))


def filled(rows: Mapping[str, Any], context: dict[str, Any], columns: dict[str, Any], **more: Any) -> Any:
    """Context and columns as they are after it, what the store was asked for, and what was told."""
    store, told = Memory(rows, more.pop("down", False)), Told()
    Filler(store, SCHEMA, more.get("key", "user"), more.get("fields", ("age", "tags")), told).fill(context, columns)
    return context, columns, store.asked, told.calls


@pytest.mark.parametrize("key", ["7", "7.0", 7])
def test_a_request_with_the_key_alone_gets_the_rest(key: str | int) -> None:
    context, columns, asked, told = filled(ROWS, {"user": key}, {"item": [1, 2]})
    assert context == {"user": key, "age": 31.0, "tags": ["a", "b"]}
    assert (columns, asked, told) == ({"item": [1, 2]}, [["7"]], [])


def test_what_is_sent_counts_before_what_is_stored() -> None:
    context, columns, asked, _ = filled(ROWS, {"user": "7", "age": 5.0}, {"tags": [["x"], None]})
    assert (context, columns, asked) == ({"user": "7", "age": 5.0}, {"tags": [["x"], None]}, [])
    assert filled(ROWS, {"user": "7", "age": None}, {})[0] == {"user": "7", "age": None, "tags": ["a", "b"]}


def test_a_key_per_candidate_is_fetched_once_each() -> None:
    rows = {"3": {"brand": "x"}, "5": {"brand": 12}}
    columns = {"item": ["3", "5", "9", None, "3"]}
    context, columns, asked, told = filled(rows, {"user": "7"}, columns, key="item", fields=("brand",))
    assert columns["brand"] == ["x", "12", None, None, "x"]
    assert (context, asked, told) == ({"user": "7"}, [["3", "5", "9"]], [(1, False)])


@pytest.mark.parametrize("user", [None, "", "nobody"])
def test_without_a_row_values_are_missing(user: str | None) -> None:
    context, _, asked, told = filled(ROWS, {"user": user}, {})
    assert context == {"user": user, "age": None, "tags": None}
    assert (asked, told) == (([["nobody"]], [(1, False)]) if user else ([], []))


def test_values_that_a_client_could_not_send_are_missing_and_counted() -> None:
    for bad in ("31", math.nan, math.inf, True, {"x": 1}, [1]):
        context, _, _, told = filled({"7": {"age": bad, "tags": "a|b", "item": 1}}, {"user": "7"}, {})
        assert context == {"user": "7", "age": None, "tags": ["a", "b"]}
        assert told == [(1, False)]


def test_a_store_that_does_not_answer_leaves_values_missing() -> None:
    context, _, _, told = filled(ROWS, {"user": "7"}, {}, down=True)
    assert context == {"user": "7", "age": None, "tags": None}
    assert told == [(1, True)]


@pytest.mark.parametrize(
    ("key", "fields", "told"),
    [
        ("age", ["tags"], "store.key: 'age' is no categorical field that clients send"),
        ("nobody", ["tags"], "store.key: 'nobody' is no categorical field"),
        ("user", ["user"], "store.fields: 'user' is the key"),
        (
            "user",
            ["hour"],
            "store.fields: 'hour' is no field that clients send; they send user, age, tags, item, brand",
        ),
    ],
)
def test_settings_that_cannot_be(key: str, fields: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        Filler.of(Store(kind="parquet", url=str(tmp_path / "f.parquet"), key=key, fields=tuple(fields)), SCHEMA)


def changed(**fields: dict[str, Any]) -> Schema:
    """The schema with other fields in the place of those of these names."""
    plain = SCHEMA.plain() | {"context": ["user"]}
    plain["fields"] = [fields.get(field["name"], field) for field in plain["fields"]]
    return Schema.model_validate(plain)


def test_after_a_change_of_schema_values_are_those_of_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "users.parquet"
    pd.DataFrame({"user": [7, 8], "age": [31, 40], "tags": ["a|b", "c"]}).to_parquet(path)
    settings = Store(kind="parquet", url=str(path), key="user", fields=("age", "tags"))
    filler = ChampionFiller(settings)
    filler.follow(SCHEMA)
    context: dict[str, Any] = {"user": "7"}
    filler.fill(context, {})
    assert context == {"user": "7", "age": 31.0, "tags": ["a", "b"]}
    text = {"type": "categorical", "encoder": "hash", "buckets": 9}
    filler.follow(changed(age={"name": "age", **text}, tags={"name": "tags", **text}))
    context = {"user": "7"}
    filler.fill(context, {})
    assert context == {"user": "7", "age": "31", "tags": "a|b"}
    with pytest.raises(InputError, match=r"store\.key: 'user' is no categorical field"):
        filler.follow(changed(user={"name": "user", "type": "numeric"}))
    shown = {"name": "age", "type": "date", "from": "at", "part": "weekday"}
    with pytest.raises(InputError, match=r"store\.fields: 'age' is no field that clients send"):
        filler.follow(changed(age=shown))
    context = {"user": "8"}
    filler.fill(context, {})
    assert context == {"user": "8", "age": "40", "tags": "c"}, "who does not suit the settings changes nothing"


def test_a_file_is_read_once_for_schemas_that_read_it_alike(table: Path) -> None:
    settings = Store(kind="parquet", url=str(table), key="user", fields=("age",))
    filler = ChampionFiller(settings)
    filler.follow(SCHEMA)
    table.unlink()
    filler.follow(changed(brand={"name": "brand", "type": "numeric"}))
    context: dict[str, Any] = {"user": "41"}
    filler.fill(context, {})
    assert context == {"user": "41", "age": 41.0}


def test_redis_is_asked_by_the_same_connections_after_a_change_of_schema(server: Redis, table: Path) -> None:
    import redis

    client = redis.Redis.from_url(server.url)
    client.set("u:7", b'{"age": 31, "tags": "a|b"}')
    settings = Store(kind="redis", url=server.url, key="user", fields=("age", "tags"), prefix="u:", timeout_ms=500.0)
    filler = ChampionFiller(settings)
    text = {"type": "categorical", "encoder": "hash", "buckets": 9}
    found = []
    for schema in (SCHEMA, changed(age={"name": "age", **text}, tags={"name": "tags", **text})):
        filler.follow(schema)
        context: dict[str, Any] = {"user": "7"}
        filler.fill(context, {})
        found.append(context)
    assert found == [{"user": "7", "age": 31.0, "tags": ["a", "b"]}, {"user": "7", "age": "31", "tags": "a|b"}]
    assert len(client.client_list()) == 2, "the test's own, and one"
    client.close()
    filler.close()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A thousand users; the first again at the end, and a row without key; ages as text, one of them none."""
    users = [*range(1000), None, 0]
    ages = [*(str(n % 90) for n in range(999)), "old", "1", "99"]
    tags = [[f"t{n % 3}", "x"] for n in range(1002)]
    path = tmp_path / "users.parquet"
    pd.DataFrame({"user": users, "age": ages, "tags": tags}).to_parquet(path)  # users become floats, for the null
    return path


def test_a_parquet_file_is_found_by_key(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ParquetStore(table, SCHEMA, "user", ["age", "tags"])
    assert len(store) == 1001
    keys = ["0", "41", "999", "1000", "nobody", "998"]
    found = store.fetch(keys)
    assert found[0] == {"age": 99.0, "tags": ["t2", "x"]}  # the last of two rows
    assert found[1] == {"age": 41.0, "tags": ["t2", "x"]}
    assert found[2] == {"age": None, "tags": ["t0", "x"]}
    assert list(found[3:5]) == [None, None]
    assert found[5] == {"age": 8.0, "tags": ["t2", "x"]}
    twice = pd.DataFrame({"user": ["a", "b", "a", "b", "a"], "age": [1, 2, 3, 4, None]})
    twice.to_parquet(table.with_name("twice.parquet"))
    last = ParquetStore(table.with_name("twice.parquet"), SCHEMA, "user", ["age"]).fetch(["a", "b"])
    assert last == [{"age": None}, {"age": 4.0}], "the last row of a key counts, whatever it holds"
    assert "1 values are none of their fields' and count as missing" in caplog.text
    context: dict[str, Any] = {"user": "41"}
    settings = Store(kind="parquet", url=str(table), key="user", fields=("age", "tags"))
    Filler.of(settings, SCHEMA).fill(context, {})
    assert context == {"user": "41", "age": 41.0, "tags": ["t2", "x"]}


def test_a_parquet_file_without_rows_or_columns(table: Path, tmp_path: Path) -> None:
    pd.read_parquet(table)[:0].to_parquet(tmp_path / "empty.parquet")
    assert ParquetStore(tmp_path / "empty.parquet", SCHEMA, "user", ["age"]).fetch(["1", "2"]) == [None, None]
    with pytest.raises(InputError, match=r"store .*users.parquet has no column 'brand'"):
        ParquetStore(table, SCHEMA, "user", ["brand"])
    with pytest.raises(InputError, match=r"store .*nothing is not a readable Parquet file"):
        ParquetStore(tmp_path / "nothing", SCHEMA, "user", ["age"])


def test_the_breaker_tries_once_in_a_while() -> None:
    now = [0.0]
    breaker = Breaker(1.0, lambda: now[0])
    assert breaker.allows()
    assert breaker.allows()
    assert breaker.failed()
    assert not breaker.allows()
    now[0] = 1.0
    assert [breaker.allows() for _ in range(3)] == [True, False, False]
    assert not breaker.failed()
    now[0] = 1.9
    assert not breaker.allows()
    now[0] = 2.0
    assert breaker.allows()
    assert breaker.worked()
    assert [breaker.allows() for _ in range(3)] == [True, True, True]
    assert not breaker.worked()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Redis]:
    redis = Redis(tmp_path)
    redis.start()
    yield redis
    redis.end()


def loaded(server: Redis, table: Path) -> None:
    """The table with its ages as numbers, by the command."""
    frame, numbers = pd.read_parquet(table), table.with_name("numbers.parquet")
    frame.assign(age=pd.to_numeric(frame["age"], errors="coerce")).to_parquet(numbers)
    command = [sys.executable, "-m", "serving.store.load", str(numbers), "--url", server.url, "--key", "user"]
    done = subprocess.run([*command, "--prefix", "u:"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "1001 rows\n"), done.stderr


def opened(server: Redis, timeout_ms: float = 500.0, told: Told | None = None) -> Filler:
    settings = Store(
        kind="redis", url=server.url, key="user", fields=("age", "tags"), prefix="u:", timeout_ms=timeout_ms
    )
    return Filler.of(settings, SCHEMA, told)


def context_of(filler: Filler, user: Any) -> dict[str, Any]:
    context = {"user": user}
    filler.fill(context, {})
    return context


@pytest.mark.long
def test_what_was_loaded_into_redis_is_fetched(server: Redis, table: Path) -> None:
    loaded(server, table)
    filler = opened(server)
    assert context_of(filler, 41) == {"user": 41, "age": 41.0, "tags": ["t2", "x"]}
    assert context_of(filler, "0") == {"user": "0", "age": 99.0, "tags": ["t2", "x"]}  # the last of two rows
    assert context_of(filler, 999) == {"user": 999, "age": None, "tags": ["t0", "x"]}
    columns: dict[str, Any] = {"user": [str(n) for n in range(1100)]}
    filler.fill({}, columns)
    assert columns["age"] == [99.0, *(float(n % 90) for n in range(1, 999)), None, *[None] * 100]
    filler.close()


@pytest.mark.long
def test_a_row_that_redis_refuses_is_not_told(server: Redis, table: Path) -> None:
    from serving.store.load import load

    with pytest.raises(InputError, match=r"^Redis does not take the rows: invalid expire time in 'set' command$"):
        load([str(table)], server.url, "user", None, expire_seconds=0)


def test_rows_that_are_no_json_object_count_as_none(server: Redis) -> None:
    import redis

    client = redis.Redis.from_url(server.url)
    for key, data in (("u:1", b"{"), ("u:2", b"[1]"), ("u:3", b'{"age": "old"}'), ("u:4", orjson.dumps({"age": 4}))):
        client.set(key, data)
    told = Told()
    columns: dict[str, Any] = {"user": ["1", "2", "3", "4"]}
    opened(server, told=told).fill({}, columns)
    assert columns["age"] == [None, None, None, 4.0]
    assert told.calls == [(3, False)]
    client.close()


@pytest.mark.long
def test_requests_go_on_while_redis_is_away_and_when_it_is_back(
    server: Redis, table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    loaded(server, table)
    told = Told()
    filler = opened(server, told=told)
    assert context_of(filler, "41")["age"] == 41.0
    server.end()
    for _ in range(20):
        assert context_of(filler, "41") == {"user": "41", "age": None, "tags": None}
    assert told.calls == [(1, True)] * 20
    server.start()
    loaded(server, table)
    deadline = time.monotonic() + 20
    while context_of(filler, "41")["age"] is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert context_of(filler, "41") == {"user": "41", "age": 41.0, "tags": ["t2", "x"]}
    assert caplog.text.count("Redis does not answer") == 1
    assert caplog.text.count("Redis answers again") == 1
    filler.close()


@pytest.mark.long
def test_a_connection_that_has_been_closed_costs_nothing(server: Redis, table: Path) -> None:
    loaded(server, table)
    told = Told()
    filler = opened(server, told=told)
    assert context_of(filler, "41")["age"] == 41.0
    server.end()  # between two requests
    server.start()
    loaded(server, table)
    assert context_of(filler, "41")["age"] == 41.0
    assert told.calls == []
    filler.close()


@pytest.mark.long
def test_a_redis_that_hangs_is_waited_for_once(server: Redis, table: Path) -> None:
    import redis

    loaded(server, table)
    told = Told()
    filler = opened(server, timeout_ms=200.0, told=told)
    assert context_of(filler, "41")["age"] == 41.0
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    tries: list[float] = []
    real = redis.Redis.mget
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redis.Redis, "mget", lambda self, keys: (tries.append(time.monotonic()), real(self, keys))[1])
        ends = time.monotonic() + 2.5
        while time.monotonic() < ends:
            assert context_of(filler, "41")["age"] is None
    assert 2 <= len(tries) <= 3
    assert len(told.calls) > 100  # the others did not wait
    server.process.send_signal(signal.SIGCONT)
    filler.close()


@pytest.mark.long
def test_a_password_is_needed_and_never_told(tmp_path: Path, table: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Redis(tmp_path, "--requirepass", "s3cret")
    server.start()
    try:
        assert context_of(opened(server), "41")["age"] is None
        command = [sys.executable, "-m", "serving.store.load", str(table), "--key", "user", "--url"]
        wrong = subprocess.run([*command, server.url], capture_output=True, text=True, check=False, timeout=60)
        assert wrong.returncode == 2
        assert wrong.stderr.startswith("Redis does not take the rows: ")
        assert wrong.stderr.count("\n") == 1
        server.url = server.url.replace("redis://", "redis://:s3cret@")
        loaded(server, table)
        assert context_of(opened(server), "41")["tags"] == ["t2", "x"]
    finally:
        server.end()
    assert "s3cret" not in caplog.text
    with pytest.raises(InputError, match=r"store.url is no Redis URL, such as redis://host:6379/0 or ") as error:
        Filler.of(Store(kind="redis", url="http://:s3cret@host", key="user", fields=("age",)), SCHEMA)
    assert "s3cret" not in str(error.value)


def test_the_loader_says_what_is_wrong(table: Path) -> None:
    from serving.store.load import load

    with pytest.raises(InputError, match=r"users.parquet has no column 'id'"):
        load([str(table)], "redis://127.0.0.1:1/0", "id", None)
    with pytest.raises(InputError, match="Redis does not take the rows"):
        load([str(table)], "redis://127.0.0.1:1/0", "user", ["age"])
