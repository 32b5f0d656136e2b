"""What tests of training share."""

import os
from collections.abc import Iterator

import mlflow
import pytest


@pytest.fixture
def own_store() -> Iterator[None]:
    """A test may set MLflow's address: other tests find their own store."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    mlflow.set_tracking_uri(None)
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before
