"""The BentoML service: workers, health and metrics are BentoML's, the routes are serving.api.routes's.

`masknet serve` starts it; its workers read the settings from the environment (serving.settings.VARIABLE), and tokens
from serving.api.auth's variables.
"""

import os

import bentoml

from features.schema import Schema
from serving.api.admission import COMPUTE_SECONDS
from serving.api.auth import Tokens
from serving.api.drain import drain_on_sigterm
from serving.api.gate import Gate
from serving.api.parts import Filler, Parts
from serving.api.routes import create_app
from serving.life.fleet import Fleet
from serving.monitoring.log import PredictionLogWriter
from serving.monitoring.metrics import Watch
from serving.settings import VARIABLE, ServeSettings
from serving.trace import Trace

_SPARE_SECONDS = 2.0  # beyond our own limits, whose errors have our body
settings = ServeSettings.model_validate_json(os.environ.get(VARIABLE, "{}"))
tokens = Tokens.of(os.environ)
app = create_app()
_limits = settings.limits
_longest = _limits.body_seconds + _limits.deadline_ms / 1e3 + COMPUTE_SECONDS + _SPARE_SECONDS


class _Log:
    """The prediction log, which the models need before it has their schema."""

    writer: PredictionLogWriter | None = None

    def offer(self, trace: Trace) -> None:
        if self.writer is not None:
            self.writer.offer(trace)


def _filler(schema: Schema, watch: Watch) -> Filler | None:
    if settings.store is None:
        return None
    from serving.store.fill import Filler as Store  # brings a client of Redis

    return Store.of(settings.store, schema, watch)


@bentoml.service(
    name="masknet",
    workers=settings.workers,
    # Beyond every limit of ours, whose errors have our body; each request keeps 5 KiB for as long.
    traffic={"timeout": _longest},
    metrics={"duration": {"buckets": [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]}},
    logging={"access": {"enabled": False}},  # a line per request costs as much as its parsing
)
@bentoml.asgi_app(app, path="/")
class MaskNetService:
    """Ranks candidates with verified bundles; ready once their golden rows have scored right."""

    def __init__(self) -> None:
        worker = bentoml.server_context.worker_index or 1
        self._watch, self._log = Watch(), _Log()
        self._fleet = Fleet.of(settings, worker, self._watch, self._log)
        self._fleet.start()
        schema = self._fleet.champion.schema
        self._log.writer = PredictionLogWriter.of(settings.log, worker, schema, self._dropped)
        filler = _filler(schema, self._watch)
        self._parts = Parts(self._fleet, settings, self._watch, self._log, filler, protected=tokens.required)
        app.state.parts = self._parts

    @bentoml.on_startup
    async def take_over_sigterm(self) -> None:
        """In the event loop, after the server has set its own handler."""
        drain_on_sigterm(self._drain, _limits.drain_seconds, _longest)

    @bentoml.on_shutdown
    def close(self) -> None:
        """End all threads; write what is logged."""
        self._parts.admission.close()
        self._fleet.stop()
        if self._log.writer is not None:
            self._log.writer.close()
        if self._parts.filler is not None:
            self._parts.filler.close()
        self._watch.close()

    def __is_ready__(self) -> bool:
        return self._parts.ready

    def _drain(self) -> None:
        self._parts.draining = True

    def _dropped(self, count: int) -> None:
        self._watch.dropped("log", count)


MaskNetService.add_asgi_middleware(Gate, tokens=tokens)  # type: ignore[attr-defined]  # the decorator makes a Service
