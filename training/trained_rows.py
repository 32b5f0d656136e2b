"""What a trained model's rows and scores look like, for its bundle: what `masknet drift` compares with."""

import numpy as np
import pyarrow as pa

from features.dataset import LABEL, PreparedDataset, weights_of
from features.drift import counts_of_split, edges_of, stands_for
from serving.monitoring.reference import Reference, ScoreReference, field_references, score_reference
from serving.scorer import Scorer
from training.fit.days import told_split

SAMPLE = 100_000  # rows that are scored: a bin holds 5,000 of them
SEED = 0


def reference_of(scorer: Scorer, data: list[PreparedDataset]) -> Reference:
    """The rows that a model was trained on, and the scores of those it was validated on; of days, of the last one.

    Negatives that were dropped, or never arrived, are made up for by those that are there.
    """
    pipeline, last = scorer.pipeline, data[-1]
    edges = edges_of(pipeline, last.files("train"))
    counts = [counts_of_split(pipeline, day.files("train"), edges, day.schema.sampling_rate) for day in data]
    return Reference(fields=field_references(pipeline, counts, edges), score=_scores(scorer, last))


def _scores(scorer: Scorer, dataset: PreparedDataset) -> ScoreReference:
    split = told_split(dataset)
    table = dataset.split(split)
    if table.num_rows > SAMPLE:
        chosen = np.sort(np.random.default_rng(SEED).choice(table.num_rows, SAMPLE, replace=False))
        table = table.take(pa.array(chosen))
    weight_N: np.ndarray | None
    if split == "train":  # a day alone, whose negatives may have been dropped after they arrived
        weight_N = stands_for(table, dataset.schema.sampling_rate)
    else:
        weight_N = weights_of(dataset.schema, table[LABEL].to_numpy())
    return score_reference(scorer.score_encoded(table), weight_N, f"{split} split")
