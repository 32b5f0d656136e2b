"""`masknet bench serve`: the load, the search for a rate, the stages, the page, and a whole run."""

import asyncio
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from training.bench import serve_load
from training.bench.serve_model import (
    MISSING,
    NEVER_SEEN,
    SMALL,
    Request,
    bench_schema,
    joined,
    make_bundle,
    make_requests,
)
from training.bench.serve_overload import OVERLOAD, Pressure, overloads
from training.bench.serve_page import page
from training.bench.serve_rows import (
    ENDPOINT,
    FAST,
    LATENCY,
    LOAD,
    LONGEST,
    MEMORY,
    ONNX,
    RATE,
    RIVAL,
    STAGE,
    Effort,
)
from training.bench.serve_search import LIMIT_MS, Search, p99
from training.bench.serve_stages import BUT_MODEL, METRIC, OUTSIDE, read_stages, split
from training.bench.serve_ways import ARROW, JSON, MLFLOW
from training.errors import Failure

ROOT = Path(__file__).parents[2]
DELAY = 0.02


class Handler(BaseHTTPRequestHandler):
    """Answers one request at a time, on any number of connections, after DELAY; every fifth is refused."""

    protocol_version = "HTTP/1.1"
    seen: list[bytes] = []  # noqa: RUF012  of one test's server
    turn = threading.Lock()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        with self.turn:
            self.seen.append(body)
            number = len(self.seen)
            time.sleep(DELAY)
        self.send_response(429 if number % 5 == 0 else 200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def probe(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What is asked of a server that does one thing at a time."""
    Handler.seen = []
    bodies = [tmp_path / name for name in ("a", "b")]
    for body in bodies:
        body.write_text(body.name * 1000)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        files = [str(body) for body in bodies]
        yield {"port": server.server_address[1], "path": "/rank", "headers": {"x": "1"}, "files": files}
        server.shutdown()
        thread.join()


def test_a_closed_loop_waits_for_every_answer(probe: dict[str, Any]) -> None:
    found = asyncio.run(serve_load.closed({**probe, "warm": 2, "count": 13}))
    assert Handler.seen == [b"a" * 1000, b"b" * 1000] * 7 + [b"a" * 1000]
    assert found["failures"] == 3  # the 5th, 10th and 15th
    assert len(found["milliseconds"]) == 10
    assert min(found["milliseconds"]) >= 1e3 * DELAY
    assert 0 < found["own_milliseconds"] < 1e3 * DELAY


def test_a_pause_lies_before_each_request_and_is_not_counted(
    probe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(serve_load.asyncio, "sleep", sleep)
    found = asyncio.run(serve_load.closed({**probe, "warm": 1, "count": 3, "pause": 7.0}))
    assert pauses == [7.0] * 4
    assert len(found["milliseconds"]) == 3
    assert max(found["milliseconds"]) < 7000.0


def test_busy_clients_ask_again_at_once_and_count_answers(probe: dict[str, Any]) -> None:
    found = asyncio.run(serve_load.busy({**probe, "clients": 3, "seconds": 0.5}))
    assert found["failures"] == len(Handler.seen) // 5
    answered = len(Handler.seen) - found["failures"]
    assert answered > 3  # each client asks again
    assert 0 < found["rate"] <= min(answered / 0.5, 1 / DELAY)  # the server computes one at a time


def test_an_open_loop_does_not_wait_and_counts_from_when_a_request_was_due(probe: dict[str, Any]) -> None:
    found = asyncio.run(serve_load.opened({**probe, "rate": 100.0, "seconds": 0.4, "seed": 3}))
    count = len(found["milliseconds"])
    assert not found["overrun"]
    assert len(Handler.seen) == count + found["failures"] == len(found["late"])
    assert found["failures"] == found["shed"] == len(Handler.seen) // 5
    assert 0 < min(found["late"]) <= max(found["milliseconds"])  # sent before it is answered
    assert 0 < found["core"] < 1
    # By a Poisson process of 40; 6 standard deviations. They come within 0.4 s and leave one after the other.
    assert 40 - 38 < count + found["failures"] < 40 + 38
    assert max(found["milliseconds"]) >= 1e3 * (DELAY * (count + found["failures"]) - 0.4)


def test_a_server_that_falls_behind_is_given_up(probe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_load, "OVERRUN", 3)
    found = asyncio.run(serve_load.opened({**probe, "rate": 1000.0, "seconds": 5.0, "seed": 1}))
    assert found["overrun"]
    assert len(found["milliseconds"]) + found["failures"] < 1000


def test_a_server_that_is_not_there_is_failures(probe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(serve_load.Connection):
        async def ask(self, request: bytes) -> int:
            self.transport.close()
            raise ConnectionRefusedError

    monkeypatch.setattr(serve_load, "Connection", Deaf)
    found = asyncio.run(serve_load.opened({**probe, "rate": 100.0, "seconds": 0.1, "seed": 2}))
    assert found["failures"] > 0
    assert found["shed"] == 0
    assert found["milliseconds"] == []


def test_the_99th_percentile_counts_failures_as_endless() -> None:
    hundred = [float(i) for i in range(1, 101)]
    assert p99(hundred[::-1], 0, False) == 99.0
    assert p99(hundred[:99], 1, False) == 99.0
    assert p99(hundred[:98], 2, False) == math.inf
    assert p99([1.0, 2.0], 0, False) == 2.0
    assert p99(hundred, 0, True) == math.inf
    assert p99([], 0, False) == math.inf


def test_runs_at_low_rates_take_longer() -> None:
    effort = Effort(turns=1, requests=1, steps=1, runs=1, seconds=4.0, least=50)
    assert [effort.seconds_at(rate) for rate in (100.0, 12.5, 10.0, 1.0)] == [4.0, 4.0, 5.0, LONGEST]


def test_the_search_ends_at_the_servers_rate() -> None:
    search = Search(high=160.0)
    for _ in range(6):
        for spoiled in (False, True, False):  # one run of three meets another program
            search.add(math.inf if spoiled else 10.0 if search.rate < 91.0 else 70.0)
        search.step()
    assert search.low <= 91.0 <= search.high
    assert search.high - search.low == 160.0 / 2**6
    assert search.p99_ms == 10.0


def test_a_server_that_stands_nothing_has_rate_0() -> None:
    search = Search(high=8.0)
    for _ in range(3):
        search.add(LIMIT_MS)
        search.step()
    assert (search.low, search.high, search.p99_ms) == (0.0, 1.0, None)


def test_stages_are_what_came_between_two_readings() -> None:
    registry = CollectorRegistry()
    stages = Histogram(METRIC, "x", ("stage", "version", "role"), registry=registry)
    other = Histogram("masknet_request_seconds", "x", ("route",), registry=registry)

    def request(parse: float, model: float, version: str = "1", role: str = "champion") -> None:
        stages.labels("parse", version, role).observe(parse)
        stages.labels("model", version, role).observe(model)
        other.labels("/rank").observe(9.0)

    request(5.0, 7.0)
    before = read_stages(generate_latest(registry).decode())
    assert before == {"parse": (5.0, 1.0), "model": (7.0, 1.0)}
    request(0.001, 0.010)
    request(0.003, 0.020, version="2")
    request(1.0, 1.0, role="shadow")
    found = split(before, read_stages(generate_latest(registry).decode()), client_ms=20.0)
    assert found == pytest.approx({"parse": 2.0, "model": 15.0, OUTSIDE: 3.0, BUT_MODEL: 5.0})
    assert split(before, before, client_ms=20.0) == {}


@pytest.mark.long
def test_the_model_is_as_the_page_says(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", SMALL)
    kinds = [field.type for field in bundle.schema.fields]
    assert (kinds.count("categorical"), kinds.count("numeric")) == (26, 13)
    assert (len(bundle.schema.context), len(bundle.schema.candidate_fields)) == (20, 19)
    requests = make_requests(bundle.schema, SMALL)
    assert [list(request.context) for request in requests] == [list(bundle.schema.context)] * SMALL.requests
    encoded = bundle.pipeline.encode(requests[0].rows)
    ids_NF = np.array([encoded[name].to_numpy() for name in bundle.schema.candidate_fields if "_c" in name])
    many = [bundle.pipeline.encode(request.rows)["candidate_c0"].to_numpy() for request in requests]
    assert ids_NF.shape == (13, SMALL.candidates)
    share = np.mean(np.concatenate(many) == 1)  # of 400 texts of a vocabulary; 5 standard deviations
    expected = NEVER_SEEN * (1 - MISSING)
    assert abs(share - expected) < 5 * math.sqrt(expected / 400)
    score_N = bundle.scorer.score(joined(requests)).astype(np.float64)
    logit_N = np.log(score_N / (1 - score_N))
    assert abs(logit_N.mean() + 2) < 0.3
    assert 0.7 < logit_N.std() < 1.3
    record = json.loads((tmp_path / "bundle" / "backends.json").read_text())
    assert any(verdict["passed"] for verdict in record["devices"]["cpu"]["backends"].values())


def test_bodies_hold_the_request_and_answers_its_scores() -> None:
    request = make_requests(bench_schema(SMALL), SMALL)[0]
    assert orjson.loads(JSON.body(request)) == {
        "context": request.context,
        "candidates": request.candidates,
        "top_k": 10,
    }
    sent = pa.ipc.open_stream(ARROW.body(request)).read_all()
    assert sent.to_pydict() == request.candidates
    assert orjson.loads(sent.schema.metadata[b"masknet"]) == {"context": request.context, "top_k": 10}
    split_ = orjson.loads(MLFLOW.body(Request({"user": "ann"}, {"item": [1, 2]})))["dataframe_split"]
    assert split_ == {"columns": ["user", "item"], "data": [["ann", 1], ["ann", 2]]}
    assert JSON.scores(b'{"items":[{"index":3,"score":0.5},{"index":1,"score":0.25}]}') == {3: 0.5, 1: 0.25}
    assert MLFLOW.scores(b'{"predictions":[0.5,0.25]}') == {0: 0.5, 1: 0.25}


def result(**changed: Any) -> dict[str, Any]:
    """A made-up result: 10 ms where PyTorch takes 40 and ONNX Runtime 12."""
    rows: list[dict[str, Any]] = []
    for server, ms, rate in ((ENDPOINT, 10.0, 80.0), (RIVAL, 40.0, 0.0), (ONNX, 12.0, 50.0)):
        quantiles = {"p20": ms - 1, "p50": ms, "p80": ms + 1, "p99": ms + 5}
        rows.append({"name": LATENCY, "server": server, **quantiles, "ratio": 40 / ms, "largest_difference": 6e-8})
        rates = {"p50": rate, "p99_ms": 45.0 if rate else None, "too_many": rate + 2, "at_least": True}
        rows.append({"name": RATE, "server": server, **rates, "ratio": rate / 2})
    for stage, ms in (("model", 8.1), (OUTSIDE, 0.4), (BUT_MODEL, 1.9)):
        rows.append({"name": STAGE, "server": ENDPOINT, "stage": stage, "p50": ms})
    for server, ms, gave_up in ((ENDPOINT, 32.0, False), (RIVAL, 900.0, True)):
        times = {"p50": ms - 5, "p99": ms, "unloaded_p99": 10.0, "ratio": ms / 10, "overrun": gave_up, "shed": 0.512}
        rates = {"sustained": 50.0, "rate": 100.0, "seconds": 40.0, "unloaded_runs": 400}
        rows.append({"name": OVERLOAD, "server": server, **times, **rates, "late_p99": 0.71, "core": 0.034})
    rows.append({"name": LOAD, "p50": 0.1})
    rows.append({"name": MEMORY, "server": ENDPOINT, "p50": 900.0, "runs": 1000, "growth": 0.051})
    shape = {"fields": 39, "context": 20, "width": 400, "head": 400, "candidates": 500}
    device = {"cpu": "a CPU", "server_cores": 1}
    facts = {"device": device, "date": "2026-01-02T03:04:05", "shape": shape}
    return {**facts, "rows": rows, "skipped": [{"name": "mlflow", "reason": "not there"}], **changed}


def test_the_page_judges_by_the_goals() -> None:
    lines = page(result()).splitlines()
    goals = [line for line in lines if line.endswith(("| yes |", "| no |"))]
    assert goals == [
        f"| p50, {ENDPOINT}, against {RIVAL} | 4.00 × | 3.00 × | yes |",
        f"| rate, {ENDPOINT}, against {RIVAL} | ≥ 40.00 × | 3.00 × | yes |",
        f"| p50, {ENDPOINT}, against {ONNX} | 1.20 × | 1.30 × | no |",
        f"| rate, {ENDPOINT}, against {ONNX} | 1.60 × | 1.30 × | yes |",
        f"| {BUT_MODEL}, {ENDPOINT} | 1.90 ms | 1.8 ms | no |",
        f"| p99 at 2 × the load, {ENDPOINT}, over the unloaded | 3.20 × | 3.00 × | no |",
        f"| growth of memory, {ENDPOINT} | 5.1% | 5% | no |",
    ]
    assert f"| {ENDPOINT} | 9 | 10 | 11 | 15 | 4.00 × | 6e-08 |" in lines
    assert f"| {RIVAL} | 0 | – | 2 | ≥ 0.00 × |" in lines
    assert f"| {ENDPOINT} | 50 | 100 | 10 | 27 | 32 | 51.2% | 3.20 × |" in lines
    assert f"| {RIVAL} | 50 | 100 | 10 | 895 | ≥ 900 | 51.2% | ≥ 90.00 × |" in lines
    assert "| model | 8.100 |" in lines
    assert "- mlflow: not there" in lines
    assert not any(FAST in line for line in lines)


def test_a_result_from_before_overload_was_measured_has_no_such_section() -> None:
    old = result()
    old["rows"] = [row for row in old["rows"] if row["name"] != OVERLOAD]
    assert "## Overload" in page(result())
    assert "verload" not in page(old)
    assert "2 × the load" not in page(old)


class Played:
    """Answers of the load, by kind of probe."""

    def __init__(self, **answers: dict[str, Any]) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._answers = answers

    def probe(self, case: Any, kind: str, **rest: Any) -> dict[str, Any]:
        self.asked.append((f"{case.name} {kind}", rest))
        return self._answers[kind]


class Named:
    name = ENDPOINT


def test_overload_is_twice_what_a_busy_server_answers() -> None:
    hundred = [float(i) for i in range(1, 101)]
    played = Played(
        closed={"milliseconds": hundred, "failures": 0},
        busy={"rate": 60.0, "failures": 0},
        open={"milliseconds": [3 * ms for ms in hundred], "failures": 50, "shed": 50, "overrun": False}
        | {"late": hundred, "core": 0.05},
    )
    (row,) = overloads(played, [Named()], Pressure(2, 100, 0.1, 4.0, 20.0))  # type: ignore[arg-type, list-item]
    assert [rest["rate"] for what, rest in played.asked if what.endswith("open")] == [120.0] * 2
    assert [rest["seconds"] for what, rest in played.asked if what.endswith("open")] == [20.0] * 2
    assert (row["sustained"], row["rate"], row["seconds"]) == (60.0, 120.0, 40.0)
    assert row["unloaded_p99"] == pytest.approx(np.percentile(hundred * 2, 99), rel=1e-3)
    assert row["ratio"] == pytest.approx(3.0, rel=1e-3)
    assert row["shed"] == pytest.approx(1 / 3, rel=1e-3)


@pytest.mark.parametrize(("kind", "told"), [("busy", "without overload"), ("open", "under overload")])
def test_requests_that_fail_otherwise_are_no_overload(kind: str, told: str) -> None:
    fine: dict[str, Any] = {"milliseconds": [1.0], "failures": 0, "rate": 60.0, "shed": 0, "overrun": False}
    fine |= {"late": [1.0], "core": 0.05}
    played = Played(**{"closed": fine, "busy": fine, "open": fine, kind: fine | {"failures": 2}})
    with pytest.raises(Failure, match=f"2 requests failed {told}"):
        overloads(played, [Named()], Pressure(1, 1, 0.1, 4.0, 20.0))  # type: ignore[arg-type, list-item]


def test_the_page_is_what_was_measured() -> None:
    found = json.loads((ROOT / "tests" / "benchmarks" / "results" / "serve.json").read_text())
    assert not found["quick"]
    assert (ROOT / "serving" / "BENCHMARK.md").read_text() == page(found)


@pytest.mark.long
def test_a_whole_run(tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    command = [
        sys.executable,
        "-m",
        "training",
        "bench",
        "serve",
        "--quick",
        "--soak",
        "600",
        "--json",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert json.loads(done.stdout) == found
    assert found["skipped"] == []
    latency = {row["server"]: row for row in found["rows"] if row["name"] == LATENCY}
    servers = {f"masknet serve, {mode}, {way}" for mode in ("exact", "fast") for way in ("JSON", "Arrow")}
    servers |= {RIVAL, ONNX, "mlflow models serve, JSON rows"}
    assert latency.keys() == servers | {"HTTP alone, JSON"}
    for server in servers - {name for name in servers if "fast" in name}:
        assert latency[server]["largest_difference"] < 1e-6, server
    assert latency["HTTP alone, JSON"]["p50"] < latency[ENDPOINT]["p50"]
    assert {row["server"] for row in found["rows"] if row["name"] == RATE} == servers
    overload = {row["server"]: row for row in found["rows"] if row["name"] == OVERLOAD}
    assert overload.keys() == {ENDPOINT, FAST, RIVAL, ONNX}
    for server in (ENDPOINT, FAST):
        assert 0 < overload[server]["shed"] < 1  # it refuses some of what it cannot compute, and does the rest
        assert overload[server]["rate"] == pytest.approx(2 * overload[server]["sustained"], rel=1e-3)
        assert overload[server]["runs"] > 0
    assert [overload[server]["shed"] for server in (RIVAL, ONNX)] == [0.0, 0.0]
    stages = {row["stage"]: row["p50"] for row in found["rows"] if row["name"] == STAGE and row["server"] == ENDPOINT}
    assert {"queue", "parse", "encode", "lookup", "model", "respond", OUTSIDE, BUT_MODEL} <= stages.keys()
    assert all(milliseconds > 0 for milliseconds in stages.values())
    (memory,) = (row for row in found["rows"] if row["name"] == MEMORY)
    assert memory["p50"] > 200  # torch alone takes as much
    subprocess.run([sys.executable, "-m", "training.bench.serve_page", out, tmp_path / "p.md"], cwd=ROOT, check=True)
    assert (tmp_path / "p.md").read_text() == page(found)
