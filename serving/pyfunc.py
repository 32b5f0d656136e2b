"""The bundle as an MLflow python_function. MLflow stores this file's text and runs it to load a model: no pickle."""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from serving.bundle import load_bundle
from serving.models import BUNDLE_ARTIFACT


class Ranker(mlflow.pyfunc.PythonModel):
    """Scores frames of raw rows with the one scorer; columns of training-only fields may be left out."""

    def load_context(self, context: Any) -> None:
        """Verify and load the bundle that was logged with the model."""
        self._bundle = load_bundle(Path(context.artifacts[BUNDLE_ARTIFACT]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.Series:
        """Probability of a click for every row."""
        return pd.Series(self._bundle.scorer.score(model_input), index=model_input.index, name="score")


mlflow.models.set_model(Ranker())
