"""A request's stages as OpenTelemetry spans below its own span, which BentoML makes.

BentoML's settings decide whether there are any and where they go (`tracing` in its configuration; by default there are
none).
"""

import time
from functools import cache

from opentelemetry import trace as telemetry

from serving.trace import Trace

_NANO = 1e9


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


@cache
def _tracer() -> telemetry.Tracer:
    from bentoml._internal.configuration.containers import BentoMLContainer  # the provider is nowhere else

    return telemetry.get_tracer("masknet", tracer_provider=BentoMLContainer.tracer_provider.get())
