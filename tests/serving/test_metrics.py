"""Metrics against sums by hand, and the dashboard against what /metrics really tells."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from opentelemetry import trace as telemetry
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import REGISTRY

from serving.monitoring import metrics, spans
from serving.monitoring.families import SCORES
from serving.monitoring.metrics import MOST_VERSIONS, Watch
from serving.trace import Trace

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "serving" / "monitoring" / "grafana.json"

Value = Callable[..., float]


@pytest.fixture
def watch() -> Iterator[Watch]:
    made = Watch()
    yield made
    made.close()


@pytest.fixture
def value() -> Value:
    """How much a sample has risen since the test began: the process's metrics outlive it."""
    before = {(s.name, *sorted(s.labels.items())): s.value for family in REGISTRY.collect() for s in family.samples}

    def risen(name: str, **labels: str) -> float:
        found = REGISTRY.get_sample_value(name, labels)
        return (found or 0.0) - before.get((name, *sorted(labels.items())), 0.0)

    return risen


def scored(version: str, score_N: list[float], role: str = "champion", route: str = "/rank") -> Trace:
    trace = Trace(route, request_id="r1", name="m", version=version, role=role, rows=len(score_N))  # type: ignore[arg-type]
    trace.seconds = {"parse": 0.0015, "model": 0.02}
    trace.values, trace.missing, trace.unknown = {"age": 4, "item": 8}, {"age": 1, "item": 0}, {"age": 0, "item": 3}
    trace.score_N = np.array(score_N, np.float32)
    return trace


def test_requests_add_up(watch: Watch, value: Value) -> None:
    first, second = [0.0004, 0.049, 0.051, 0.99], [0.5, 1.0]
    watch.answered(scored("7a", first))
    watch.answered(scored("7a", second))
    watch.answered(scored("8a", [0.3], role="challenger"))
    watch.flush()
    seven = {"version": "7a", "role": "champion"}
    assert value("masknet_requests_total", route="/rank", status="200", **seven) == 2
    assert value("masknet_requests_total", route="/rank", status="200", version="8a", role="challenger") == 1
    assert value("masknet_request_seconds_sum", route="/rank", **seven) == pytest.approx(2 * 0.0215)
    assert value("masknet_request_seconds_bucket", route="/rank", le="0.016", **seven) == 0
    assert value("masknet_request_seconds_bucket", route="/rank", le="0.024", **seven) == 2
    assert value("masknet_stage_seconds_bucket", stage="parse", le="0.002", **seven) == 2
    assert value("masknet_stage_seconds_bucket", stage="model", le="0.016", **seven) == 0
    assert value("masknet_candidates_sum", route="/rank", **seven) == 6
    assert [value(f"masknet_{name}_total", field="item", **seven) for name in ("values", "missing", "unknown")] == [
        16, 0, 6,
    ]  # fmt: skip
    assert value("masknet_missing_total", field="age", **seven) == 2
    scores = np.array(first + second, np.float32)
    for bound in SCORES:
        found = value("masknet_score_bucket", le=str(bound), **seven)
        assert found == np.count_nonzero(scores <= bound), bound
    assert value("masknet_score_count", **seven) == 6
    assert value("masknet_score_sum", **seven) == pytest.approx(float(scores.sum()), rel=1e-6)


def test_a_shadow_is_no_request(watch: Watch, value: Value) -> None:
    watch.answered(scored("9a", [0.2, 0.4], role="shadow"))
    watch.flush()
    nine = {"version": "9a", "role": "shadow"}
    assert value("masknet_requests_total", route="/rank", status="200", **nine) == 0
    assert value("masknet_values_total", field="age", **nine) == 0
    assert value("masknet_score_count", **nine) == 2


def test_refusals_swaps_and_drops(watch: Watch, value: Value) -> None:
    watch.refused("/rank", 429, "busy")
    watch.refused("/rank", 429, "busy")
    watch.refused("/../etc", 404, "not_found")
    watch.swap("refused")
    watch.fetch(3, timed_out=True)
    watch.fetch(0)
    watch.dropped("log", 2)
    watch.queue(5)
    watch.flush()
    assert value("masknet_refused_total", route="/rank", status="429", code="busy") == 2
    assert value("masknet_refused_total", route="other", status="404", code="not_found") == 1
    assert value("masknet_requests_total", route="/rank", status="429", version="", role="") == 2
    assert value("masknet_swaps_total", outcome="refused") == 1
    assert value("masknet_store_missed_total") == 3
    assert value("masknet_store_timeouts_total") == 1
    assert value("masknet_dropped_total", what="log") == 2
    assert REGISTRY.get_sample_value("masknet_queue") == 5


def test_the_model_before_is_held_no_longer(watch: Watch) -> None:
    watch.model("m", "20a", "champion")
    watch.model("m", "21a", "champion")
    held = [
        REGISTRY.get_sample_value("masknet_model_info", {"name": "m", "version": version, "role": "champion"})
        for version in ("20a", "21a")
    ]
    assert held == [0, 1]


def test_versions_are_bounded(watch: Watch, value: Value) -> None:
    for number in range(MOST_VERSIONS + 5):
        watch.answered(scored(f"v{number}", [0.5]))
    watch.flush()
    assert value("masknet_score_count", version=f"v{MOST_VERSIONS - 1}", role="champion") == 1
    assert value("masknet_score_count", version="other", role="champion") == 5
    assert value("masknet_score_count", version=f"v{MOST_VERSIONS}", role="champion") == 0


def test_the_thread_hands_on_by_itself_and_at_the_end(value: Value, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "EVERY", 0.01)
    watch = Watch()
    watch.answered(scored("30a", [0.5]))
    until = time.monotonic() + 10
    while not value("masknet_score_count", version="30a", role="champion") and time.monotonic() < until:
        time.sleep(0.01)
    assert value("masknet_score_count", version="30a", role="champion") == 1
    watch.close()
    monkeypatch.setattr(metrics, "EVERY", 1000.0)
    watch = Watch()
    watch.answered(scored("30a", [0.5, 0.5]))
    watch.close()
    assert value("masknet_score_count", version="30a", role="champion") == 3


def test_stages_are_spans_of_the_request(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    found, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(found))
    monkeypatch.setattr(spans, "_tracer", lambda: provider.get_tracer("test"))
    trace = scored("7", [0.5])
    with provider.get_tracer("test").start_as_current_span("POST /rank") as request:
        request.end()  # as the answer does before anything is counted
        watch.answered(trace)
    http, parse, model, whole = found.get_finished_spans()
    assert [span.name for span in (http, parse, model, whole)] == ["POST /rank", "parse", "model", "masknet /rank"]
    assert whole.parent is not None
    assert whole.parent.span_id == request.get_span_context().span_id
    for span in (parse, model):
        assert span.parent is not None
        assert whole.context is not None
        assert span.parent.span_id == whole.context.span_id
    assert parse.end_time is not None
    assert parse.start_time is not None
    assert parse.end_time - parse.start_time == pytest.approx(1.5e6, abs=2)
    assert (parse.start_time, model.start_time, model.end_time) == (whole.start_time, parse.end_time, whole.end_time)
    assert whole.attributes is not None
    assert dict(whole.attributes) == {
        "masknet.model": "m", "masknet.version": "7", "masknet.role": "champion", "masknet.request_id": "r1",
        "masknet.rows": 1,
    }  # fmt: skip
    found.clear()
    watch.answered(trace)  # nobody records
    assert telemetry.get_current_span().is_recording() is False
    assert not found.get_finished_spans()


def test_workers_add_up(tmp_path: Path) -> None:
    """Two processes that write to one folder, as BentoML's workers do, read by a third."""
    work = (
        "import numpy as np; from serving.monitoring.metrics import Watch; from serving.trace import Trace;"
        "w = Watch(); t = Trace('/rank', name='m', version='1', rows=2, score_N=np.array([.25, .75], np.float32));"
        "t.values = {'age': 3}; w.answered(t); w.model('m', '1', 'champion'); w.close()"
    )
    read = (
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess as m; r = CollectorRegistry();"
        "m.MultiProcessCollector(r); print(generate_latest(r).decode())"
    )
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def run(code: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout

    command = [sys.executable, "-c", f"{work}; print(); input()"]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        first.stdout.readline()  # it has counted, and lives
        run(work)
        told = run(read)
        first.kill()
    assert 'masknet_values_total{field="age",role="champion",version="1"} 6.0' in told
    assert 'masknet_score_bucket{le="0.3",role="champion",version="1"} 2.0' in told
    assert 'masknet_score_sum{role="champion",version="1"} 2.0' in told
    assert 'masknet_model_info{name="m",role="champion",version="1"} 2.0' in told
    run(work)  # takes the places of both, which have ended and not said so
    told = run(read)
    assert 'masknet_model_info{name="m",role="champion",version="1"} 1.0' in told
    assert 'masknet_values_total{field="age",role="champion",version="1"} 9.0' in told


def test_the_dashboard_shows_every_metric_and_no_other(watch: Watch) -> None:
    board = json.loads(DASHBOARD.read_text())
    told = {s.name for family in REGISTRY.collect() if family.name.startswith("masknet") for s in family.samples}
    families = {f.name for f in REGISTRY.collect() if f.name.startswith("masknet")}
    watch.answered(scored("7", [0.5]))
    watch.refused("/rank", 429, "busy")
    watch.model("m", "7", "champion")
    watch.swap("done")
    watch.dropped("log")
    watch.flush()
    told |= {s.name for family in REGISTRY.collect() if family.name.startswith("masknet") for s in family.samples}
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"masknet_[a-z_]+", target["expr"])
    }
    assert asked <= told
    shown = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked}
    assert shown == families
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "instance"}
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in board["panels"])
