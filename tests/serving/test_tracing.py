"""Traces: from a real service to a collector that speaks OpenTelemetry's own protocol."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from features.errors import InputError
from serving.monitoring import spans
from serving.settings import Tracing
from serving.start import read_settings
from tests.serving.collector import Collector
from tests.serving.conftest import ITEMS
from tests.serving.running import ROOT, Service

BODY = {"context": {"user": "ann"}, "candidates": {"item": list(range(ITEMS))}}
STAGES = ["encode", "lookup", "model", "parse", "queue", "respond"]
CALLER = "0af7651916cd43dd8448eb211c80319c"
HEADERS = {"x-request-id": "traced", "traceparent": f"00-{CALLER}-b7ad6b7169203331-01"}
ENDPOINT = "http://collector:4318/v1/traces"
EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


def test_without_what_sends_them_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    section = Tracing(endpoint=ENDPOINT)
    assert spans.tracing_of(section)["otlp"] == {"protocol": "http", "endpoint": ENDPOINT}
    monkeypatch.setitem(sys.modules, EXPORTER, None)
    with pytest.raises(InputError, match=r"pip install 'masknet\[otlp\]'"):
        spans.tracing_of(section)
    with pytest.raises(InputError, match=r"tracing\.endpoint"):
        read_settings(None, ["tracing.endpoint=collector:4318"])


def test_the_end_does_not_wait_for_a_collector_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Provider:
        asked, back = threading.Event(), threading.Event()

        def shutdown(self) -> None:
            self.asked.set()
            self.back.wait()

    monkeypatch.setattr(spans, "_LAST_SECONDS", 0.05)
    monkeypatch.setattr(spans, "_provider", Provider)
    spans.send_the_rest()
    assert Provider.asked.is_set()
    Provider.back.set()


@pytest.mark.long
def test_a_request_and_its_stages_arrive(small_bundle: Path, tmp_path: Path) -> None:
    with Collector() as collector:
        words = ("limits.drain_seconds=0", "tracing.share=1.0", f"tracing.endpoint={collector.endpoint}")
        with Service(tmp_path, str(small_bundle), *(each for word in words for each in ("--set", word))) as service:
            assert httpx.post(f"{service.uri}/rank", json=BODY, headers=HEADERS).status_code == 200
        found = collector.spans  # the end of the service has sent the rest
    by_name = {span.name: span for span in found}
    whole, request = by_name["masknet /rank"], by_name["POST /rank"]
    assert whole.parent_span_id == request.span_id
    assert {whole.trace_id, request.trace_id} == {bytes.fromhex(CALLER)}
    about: dict[str, Any] = {each.key: each.value.string_value or each.value.int_value for each in whole.attributes}
    assert (about["masknet.request_id"], about["masknet.role"], about["masknet.rows"]) == ("traced", "champion", ITEMS)
    stages = [span for span in found if span.parent_span_id == whole.span_id]
    stages.sort(key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano))
    assert sorted(span.name for span in stages) == STAGES
    edges = [whole.start_time_unix_nano, *(span.end_time_unix_nano for span in stages)]
    assert [span.start_time_unix_nano for span in stages] == edges[:-1]
    assert edges[-1] == whole.end_time_unix_nano > whole.start_time_unix_nano
    assert not any("readyz" in name for name in by_name)


@pytest.mark.long
def test_bentoml_leaves_out_what_is_not_sent() -> None:
    script = """
from bentoml._internal.configuration.containers import BentoMLContainer
from serving.service import MaskNetService
MaskNetService.inject_config()  # as its servers do before they make the application
print([BentoMLContainer.tracing_excluded_urls.get().url_disabled("http://h:1" + path) for path in ("/rank", "/readyz")])
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[True, True]"


@pytest.mark.long
def test_nothing_is_sent_unless_the_settings_say_so(small_bundle: Path, tmp_path: Path) -> None:
    """Whatever the caller traces and OpenTelemetry's own variables name."""
    with Collector() as collector:
        variables = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": collector.endpoint, "OTEL_TRACES_EXPORTER": "otlp"}
        words = (str(small_bundle), "--set", "limits.drain_seconds=0")
        with Service(tmp_path, *words, **variables, OTEL_BSP_SCHEDULE_DELAY="50") as service:
            for _ in range(20):
                assert httpx.post(f"{service.uri}/rank", json=BODY, headers=HEADERS).status_code == 200
    assert collector.posts == 0
