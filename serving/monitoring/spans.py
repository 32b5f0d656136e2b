"""A request's stages as OpenTelemetry spans below its own span, which BentoML makes and sends to a collector."""

import threading
import time
from functools import cache
from typing import Any

from opentelemetry import trace as telemetry

from features.errors import InputError
from serving.settings import Tracing
from serving.trace import Trace

_NANO = 1e9
_LAST_SECONDS = 2.0  # for what is not sent yet when the service ends
_PROBES = "/(livez|readyz|healthz|metrics)$"


def tracing_of(section: Tracing | None) -> dict[str, Any]:
    """BentoML's configuration of what the service's settings say.

    Without a collector no URL is traced: BentoML would make a span of every request all the same, which takes half a
    millisecond.

    Raises:
        InputError: there is a collector, but nothing that sends to it.
    """
    if section is None:
        return {"excluded_urls": ["."]}
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401
    except ImportError:
        raise InputError(
            "tracing.endpoint needs the package opentelemetry-exporter-otlp-proto-http: pip install 'masknet[otlp]'"
        ) from None
    otlp = {"protocol": "http", "endpoint": section.endpoint}
    return {"exporter_type": "otlp", "sample_rate": section.share, "excluded_urls": [_PROBES], "otlp": otlp}


def add_spans(trace: Trace) -> None:
    """Report a request that ends now, and its stages, where its span is recorded; the answer may have ended that.

    A stage with several parts counts as one, and stages as if they had followed each other.
    """
    request = telemetry.get_current_span()
    if not request.get_span_context().trace_flags.sampled:
        return
    about = {"model": trace.name, "version": trace.version, "role": trace.role, "request_id": trace.request_id}
    attributes: dict[str, str | int] = {
        **{f"masknet.{key}": value for key, value in about.items()},
        "masknet.rows": trace.rows,
    }
    start = time.time_ns() - int((time.perf_counter() - trace.started) * _NANO)
    context = telemetry.set_span_in_context(request)
    whole = _tracer().start_span(f"masknet {trace.route}", context, attributes=attributes, start_time=start)
    inside = telemetry.set_span_in_context(whole)
    for stage, seconds in trace.seconds.items():
        end = start + int(seconds * _NANO)
        _tracer().start_span(stage, inside, start_time=start).end(end)
        start = end
    whole.end(start)


def send_the_rest() -> None:
    """Before the process ends, which waits no longer than this for a collector that does not answer."""
    last = threading.Thread(target=_provider().shutdown, daemon=True)
    last.start()
    last.join(_LAST_SECONDS)


@cache
def _tracer() -> telemetry.Tracer:
    return telemetry.get_tracer("masknet", tracer_provider=_provider())


def _provider() -> Any:
    from bentoml._internal.configuration.containers import BentoMLContainer  # it is nowhere else

    return BentoMLContainer.tracer_provider.get()
