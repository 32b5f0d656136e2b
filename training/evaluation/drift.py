"""How far the evaluated rows are from those that the model was trained on."""

import numpy as np
import pyarrow as pa

from features.dataset import LABEL, SplitFiles
from features.drift import (
    counted,
    counted_scores,
    counts_of_split,
    edges_of,
    score_starts,
    stability_index,
    stands_for,
)
from features.metrics import psi
from features.pipeline import FeaturePipeline
from serving.bundle import Bundle
from training.evaluation.results import Drift, FloatN

SAMPLE = 50_000  # training rows that are scored


def drift(
    bundle: Bundle, table: pa.Table, score_N: FloatN, train: SplitFiles | None, split: str, *, seed: int = 0
) -> Drift | None:
    """PSI from the training split to the evaluated rows, of each field and of the score; None without the former.

    Fields have the bins of a data set's profile, scores those of twenty quantiles in training. Of the negatives in
    training each counts as often as `negative_sampling` makes it stand for. By common usage .1 is little and .2 much;
    chance alone leaves about (bins − 1) · (1 / training rows + 1 / evaluated rows). The model has learned from the
    training rows, so their scores spread wider than those of new rows even where nothing has drifted.

    Args:
        bundle: what has encoded both.
        table: the evaluated rows.
        score_N: their scores.
        train: the training split.
        split: what the evaluated rows are called.
        seed: of the sample of training rows that are scored.
    """
    if train is None:
        return None
    sampling = bundle.schema.negative_sampling
    rate = sampling.rate if sampling else 1.0
    return Drift(
        of=f"train → {split}",
        fields=_fields(bundle.pipeline, table, train, rate),
        score=_score(bundle, score_N, train, rate, seed),
    )


def _fields(pipeline: FeaturePipeline, table: pa.Table, train: SplitFiles, rate: float) -> dict[str, float | None]:
    edges = edges_of(pipeline, train)
    expected = counts_of_split(pipeline, train, edges, rate)
    return {
        field.name: stability_index(expected[field.name], counted(field, table, edges)) for field in pipeline.fields
    }


def _score(bundle: Bundle, score_N: FloatN, train: SplitFiles, rate: float, seed: int) -> float | None:
    sample = _sample(train, [*bundle.pipeline.names, LABEL], seed)
    if not sample.num_rows or not len(score_N):
        return None
    train_S, weight_S = bundle.scorer.score_encoded(sample), stands_for(sample, rate)
    starts = score_starts(train_S, weight_S)
    return psi(counted_scores(train_S, starts, weight_S), counted_scores(score_N, starts))


def _sample(train: SplitFiles, columns: list[str], seed: int) -> pa.Table:
    """Random training rows, in their order, read a row group at a time."""
    random = np.random.default_rng(seed)
    row_S = np.sort(random.choice(train.num_rows, min(SAMPLE, train.num_rows), replace=False))
    parts, start = [], 0
    for group in train.row_groups:
        first, last = np.searchsorted(row_S, (start, start + group.rows))
        if last > first:
            parts.append(train.read(group, columns).take(pa.array(row_S[first:last] - start)))
        start += group.rows
    return pa.concat_tables(parts)
