"""Scoring in others' loops: frames of pandas, as Spark's `mapInPandas` and MLflow's python_function pass them."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import pandas as pd

from features.errors import InputError
from features.schema import Schema
from serving.bundle import Bundle, load_bundle
from serving.models import locate
from serving.scoring.part import SCORE

if TYPE_CHECKING:
    from mlflow.models import ModelSignature


def score_batches(frames: Iterable[pd.DataFrame], model: str) -> Iterator[pd.DataFrame]:
    """Each frame with a column `score`, in float32; all else, the index too, stays as it is.

    Every process loads and verifies the model once. Workers find an alias at different times, so name a version:

        scored = rows.mapInPandas(partial(score_batches, model="models:/ranker/7"), "user_id string, …, score float")

    Args:
        frames: raw rows, with the columns of the fields and those that date fields read.
        model: a bundle's folder, models:/name/version, models:/name@alias or run id.

    Raises:
        InputError: there is no such model, a frame has a column `score`, or a row cannot be scored.
    """
    bundle = _loaded(model)
    for frame in frames:
        if SCORE in frame.columns:
            raise InputError(f"a frame has a column {SCORE!r} already: drop or rename it")
        yield frame.assign(**{SCORE: bundle.scorer.score(frame)})


def signature_of(schema: Schema) -> "ModelSignature":
    """Names of the columns that a python_function takes, and what it gives, for MLflow.

    Columns are of any type: MLflow casts none of them then, so that ids keep all their digits, and 7 and "7" may both
    come. Of training-only fields, which count as their defaults, none is named.
    """
    from mlflow.models import ModelSignature  # seconds, which Spark's workers do not need
    from mlflow.types import ColSpec, DataType
    from mlflow.types import Schema as Columns
    from mlflow.types.schema import AnyType

    names = dict.fromkeys([*(field.name for field in schema.served_fields), *schema.date_columns])
    inputs = Columns([ColSpec(AnyType(), name) for name in names])
    return ModelSignature(inputs, Columns([ColSpec(DataType.float, SCORE)]))


@lru_cache(maxsize=1)
def _loaded(model: str) -> Bundle:
    return load_bundle(locate(model).path)
