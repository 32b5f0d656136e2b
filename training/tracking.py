"""MLflow: one run per training, its numbers in batches, and the bundle in the registry. Rank 0 only."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from features.errors import InputError
from serving.models import BUNDLE_ARTIFACT, VERSION_TAG
from training.config import Config

CANDIDATE = "candidate"
_FLUSH_STEPS = 50  # a metric costs about 0.3 ms in a batch and ten times that alone
# What loading a bundle imports beside this package, which has to be installed where a model is loaded.
_NEEDS = (
    "mlflow",
    "torch",
    "torchrec",
    "pandas",
    "polars",
    "pyarrow",
    "pydantic",
    "safetensors",
    "polars-hash",
)
_BATCH_LIMIT = 1000  # metrics that MLflow takes at once


class Run:
    """An MLflow run that is under way; collects metrics and sends them in batches."""

    def __init__(self, run_id: str, config: Config) -> None:
        self.run_id = run_id
        self._config = config
        self._client = mlflow.MlflowClient()
        self._pending: list[Metric] = []
        self._flushed_at = 0

    def metrics(self, step: int, values: dict[str, float | None]) -> None:
        """Record numbers of a step; None is left out."""
        now = int(time.time() * 1000)
        self._pending += [Metric(key, value, now, step) for key, value in values.items() if value is not None]
        if step - self._flushed_at >= _FLUSH_STEPS:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Send what is pending."""
        for start in range(0, len(self._pending), _BATCH_LIMIT):
            self._client.log_batch(self.run_id, metrics=self._pending[start : start + _BATCH_LIMIT])
        self._pending.clear()
        self._flushed_at = step

    def text(self, content: str, name: str) -> None:
        """Store a text file under the run."""
        self._client.log_text(self.run_id, content, name)

    def register(self, bundle: Path) -> str:
        """Log the bundle as a python_function without pickle, register it as `candidate`, and return its URI."""
        spec = find_spec("serving.pyfunc")
        assert spec is not None
        assert spec.origin is not None
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=spec.origin,
            artifacts={BUNDLE_ARTIFACT: str(bundle)},
            pip_requirements=[f"{name}=={version(name)}" for name in _NEEDS],
        )
        name = self._config.tracking.registered_model
        if not self._client.search_registered_models(f"name = '{name}'"):
            self._client.create_registered_model(name)
        made = self._client.create_model_version(name, info.model_uri, self.run_id, model_id=info.model_id)
        self._client.set_registered_model_alias(name, CANDIDATE, str(made.version))
        uri = f"models:/{name}/{made.version}"
        self._client.set_tag(self.run_id, VERSION_TAG, uri)
        return uri


@contextmanager
def track(config: Config, data: dict[str, Any]) -> Iterator[Run]:
    """Open a run with the configuration as parameters and the data set's hashes as a file.

    Raises:
        InputError: the tracking store cannot be reached.
    """
    if config.tracking.uri:
        mlflow.set_tracking_uri(config.tracking.uri)
    try:
        mlflow.set_experiment(config.experiment)
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"MLflow at {mlflow.get_tracking_uri()} cannot be used: {reason}") from None
    with mlflow.start_run() as active:
        run = Run(active.info.run_id, config)
        mlflow.log_params(flat(config.model_dump(mode="json")))
        mlflow.log_dict(data, "data.json")
        mlflow.set_tag("masknet.pipeline_digest", data["pipeline_digest"])
        yield run


def attach_report(run_id: str | None, folder: Path, split: str) -> None:
    """Store an evaluation's files under the run that trained the model, where that run is known here."""
    if run_id is not None:
        with suppress(MlflowException):  # a bundle's folder may have come from elsewhere
            mlflow.MlflowClient().log_artifacts(run_id, str(folder), f"report/{split}")


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as one level of keys joined by points."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
