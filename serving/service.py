"""The BentoML service: health, metrics and workers are BentoML's, the routes are serving.api.routes's.

`masknet serve` starts it; the bundle's folder comes in MASKNET_BUNDLE, what the registry calls it in MASKNET_VERSION.
"""

import os
from pathlib import Path

import bentoml

from serving.api.routes import create_app
from serving.bundle import load_bundle
from serving.ranking.engine import RankingEngine
from serving.start import BUNDLE_VARIABLE, VERSION_VARIABLE, WORKERS_VARIABLE

app = create_app()


@bentoml.service(
    name="masknet",
    workers=int(os.environ.get(WORKERS_VARIABLE, "1")),
    traffic={"timeout": 10},
    metrics={"duration": {"buckets": [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]}},
)
@bentoml.asgi_app(app, path="/")
class MaskNetService:
    """Ranks candidates with one verified bundle; ready once its golden rows have scored right."""

    def __init__(self) -> None:
        bundle = load_bundle(Path(os.environ[BUNDLE_VARIABLE]))
        app.state.engine = RankingEngine(bundle, os.environ[VERSION_VARIABLE])
