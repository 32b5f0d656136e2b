"""The check of fast backends at a training's end, on rows that its model was validated on."""

import numpy as np

from features.dataset import LABEL, PreparedDataset
from serving.backends.check import check_backends
from serving.backends.record import Backends
from serving.scorer import Scorer
from training.fit.days import told_split
from training.sections import ServingConfig


def checked(config: ServingConfig, scorer: Scorer, dataset: PreparedDataset) -> Backends | None:
    """Which fast backends may serve a model, by the validation split or, of a day, by the rows that it was scored on.

    None where the configuration asks for no check, or there are fewer than two rows.
    """
    if not config.fast:
        return None
    split = told_split(dataset)
    table = dataset.split(split)
    if table.num_rows < 2:
        return None
    label_N: np.ndarray = table[LABEL].to_numpy()
    return check_backends(scorer, table, label_N, split, config.check_rows)
