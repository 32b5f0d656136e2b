"""The BentoML service: workers, health and metrics are BentoML's, the routes are serving.api.routes's.

`masknet serve` starts it; its workers read the settings from the environment (serving.settings.VARIABLE), and tokens
from serving.api.auth's variables.
"""

import os
from typing import TYPE_CHECKING

import bentoml

from serving.api.admission import COMPUTE_SECONDS
from serving.api.auth import Tokens
from serving.api.drain import drain_on_sigterm
from serving.api.gate import Gate
from serving.api.parts import Parts
from serving.api.routes import Routes
from serving.life.fleet import Fleet
from serving.monitoring.log import PredictionLogWriter
from serving.monitoring.metrics import Watch
from serving.monitoring.spans import send_the_rest, tracing_of
from serving.ranking.engine import RankingEngine
from serving.settings import VARIABLE, ServeSettings

if TYPE_CHECKING:
    from serving.store.fill import ChampionFiller

_SPARE_SECONDS = 2.0  # beyond our own limits, whose errors have our body
settings = ServeSettings.model_validate_json(os.environ.get(VARIABLE, "{}"))
tokens = Tokens.of(os.environ)
routes = Routes()
_limits = settings.limits
_longest = _limits.body_seconds + _limits.deadline_ms / 1e3 + COMPUTE_SECONDS + _SPARE_SECONDS


def _filler(watch: Watch) -> "ChampionFiller | None":
    if settings.store is None:
        return None
    from serving.store.fill import ChampionFiller  # brings a client of Redis

    return ChampionFiller(settings.store, watch)


@bentoml.service(
    name="masknet",
    workers=settings.workers,
    # Beyond every limit of ours, whose errors have our body; each request keeps 5 KiB for as long.
    traffic={"timeout": _longest},
    metrics={"duration": {"buckets": [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]}},
    logging={"access": {"enabled": False}},  # a line per request costs as much as its parsing
    tracing=tracing_of(settings.tracing),
)
@bentoml.asgi_app(routes.app, path="/")
class MaskNetService:
    """Ranks candidates with verified bundles; ready once their golden rows have scored right."""

    def __init__(self) -> None:
        worker = bentoml.server_context.worker_index or 1
        self._watch = Watch()
        self._filler, self._log = _filler(self._watch), PredictionLogWriter.of(settings.log, worker, self._dropped)
        self._fleet = Fleet(settings, worker, self._watch, self._log, self._follow)
        self._fleet.start()
        self._parts = Parts(self._fleet, settings, self._watch, self._log, self._filler, protected=tokens.required)
        routes.parts = self._parts

    @bentoml.on_startup
    async def take_over_sigterm(self) -> None:
        """In the event loop, after the server has set its own handler."""
        drain_on_sigterm(self._drain, _limits.drain_seconds, _longest)

    @bentoml.on_shutdown
    def close(self) -> None:
        """End all threads; write what is logged, send what is traced."""
        self._parts.admission.close()
        self._fleet.stop()
        if self._log is not None:
            self._log.close()
        if self._filler is not None:
            self._filler.close()
        self._watch.close()
        if settings.tracing is not None:
            send_the_rest()

    def __is_ready__(self) -> bool:
        return self._parts.ready

    def _follow(self, champion: RankingEngine) -> None:
        """Fetch and log by the schema of the next champion, before it answers."""
        if self._filler is not None:
            self._filler.follow(champion.schema)
        if self._log is not None:
            self._log.follow(champion.name, champion.version, champion.schema)

    def _drain(self) -> None:
        self._parts.draining = True

    def _dropped(self, count: int) -> None:
        self._watch.dropped("log", count)


MaskNetService.add_asgi_middleware(Gate, tokens=tokens, routes=routes.by_path, told=routes.refused)  # type: ignore[attr-defined]  # the decorator makes a Service
