"""What a practitioner would take instead of MaskNet, on the same encoded columns: LightGBM and logistic regression."""

from itertools import product
from typing import Any

import lightgbm
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.dataset import LABEL, PreparedDataset
from features.encoders import Scale
from features.metrics import logloss
from training.baselines import baseline_scores

FloatN = npt.NDArray[np.float64]
SHAPES = (15, 63)  # leaves
SMOOTHINGS = (1, 10)  # of a category's statistics
GROUPS = (20, 100)  # rows that a category needs to count on its own
SEARCHED = (SHAPES, SMOOTHINGS, GROUPS)
LIST_COLUMNS = 64  # a list of more ids than this is folded onto so many columns
ROUNDS, PATIENCE = 3000, 50


def logistic_regression(dataset: PreparedDataset) -> FloatN:
    """Test scores; the penalty is chosen on validation."""
    return baseline_scores(dataset, "test")["logistic regression"]


def lightgbm_searched(dataset: PreparedDataset, seeds: int) -> tuple[list[FloatN], dict[str, Any]]:
    """Test scores by seed of the settings with the best validation log loss, and those settings.

    Ids are categorical features, numbers that were cut into buckets ordered ones, lists a column per id; boosting stops
    when validation log loss has not improved for 50 rounds.
    """
    tables = {name: dataset.split(name) for name in ("train", "valid", "test")}
    columns = {name: _columns(dataset, table) for name, table in tables.items()}
    labels = {name: table[LABEL].to_numpy() for name, table in tables.items()}
    categorical = _categorical(dataset)

    def trained(setting: dict[str, Any], seed: int) -> lightgbm.Booster:
        train = lightgbm.Dataset(columns["train"], labels["train"], categorical_feature=categorical)
        valid = train.create_valid(columns["valid"], labels["valid"])
        stop = lightgbm.early_stopping(PATIENCE, verbose=False)
        return lightgbm.train({**setting, "seed": seed}, train, ROUNDS, valid_sets=[valid], callbacks=[stop])

    def loss(setting: dict[str, Any]) -> float:
        return logloss(labels["valid"], np.asarray(trained(setting, 1).predict(columns["valid"])))

    best = min((_setting(*point) for point in product(*SEARCHED)), key=loss)
    return [np.asarray(trained(best, seed).predict(columns["test"])) for seed in range(1, seeds + 1)], best


def _setting(leaves: int, smoothing: int, group: int) -> dict[str, Any]:
    return {
        "objective": "binary",
        "learning_rate": 0.05,
        "num_leaves": leaves,
        "cat_smooth": smoothing,
        "min_data_per_group": group,
        "max_cat_threshold": 64,
        "feature_fraction": 0.8,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
        "num_threads": 2,
        "verbose": -1,
    }


def _columns(dataset: PreparedDataset, table: pa.Table) -> FloatN:
    """A column per field, and per id of a list."""
    served, found = dataset.pipeline.as_served(table), []
    for field in dataset.pipeline.fields:
        column = served[field.name].combine_chunks()
        if not field.is_list:
            found.append(column.to_numpy(zero_copy_only=False).astype(np.float64)[:, None])
            continue
        assert not isinstance(field.encoder, Scale)
        counts = np.zeros((table.num_rows, min(field.encoder.num_ids, LIST_COLUMNS)))
        row_I = np.repeat(np.arange(table.num_rows), np.diff(column.offsets.to_numpy()))
        np.add.at(counts, (row_I, column.flatten().to_numpy() % counts.shape[1]), 1)
        found.append(counts)
    return np.hstack(found)


def _categorical(dataset: PreparedDataset) -> list[int]:
    places, place = [], 0
    for field in dataset.pipeline.fields:
        if field.is_list:
            assert not isinstance(field.encoder, Scale)
            place += min(field.encoder.num_ids, LIST_COLUMNS)
            continue
        if field.spec.type in ("categorical", "cross"):
            places.append(place)
        place += 1
    return places
