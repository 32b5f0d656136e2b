"""What tests of training share."""

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import mlflow
import pytest

from serving.models import BUNDLE_ARTIFACT
from training.config import Config


@pytest.fixture
def own_store() -> Iterator[None]:
    """A test may set MLflow's address: other tests find their own store."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    mlflow.set_tracking_uri(None)
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(scope="module")
def register(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], str]:
    """Registers a copy of a bundle under a name, with a run of its own, and returns the number of the version."""
    home, client = tmp_path_factory.mktemp("registry"), mlflow.MlflowClient()
    numbers = count()

    def register(bundle: Path, name: str) -> str:
        model = home / str(next(numbers))
        shutil.copytree(bundle, model / "artifacts" / BUNDLE_ARTIFACT)
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        run_id = client.create_run(experiment).info.run_id
        return str(client.create_model_version(name, model.as_uri(), run_id).version)

    experiment = client.create_experiment(f"registered {home.name}", artifact_location=(home / "runs").as_uri())
    return register
