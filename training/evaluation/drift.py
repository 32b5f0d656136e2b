"""How far the evaluated rows are from those that the model was trained on."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import flat_values
from features.counting import NumberCounts
from features.dataset import LABEL, SplitFiles
from features.encoders import Scale
from features.metrics import psi
from features.pipeline import FeaturePipeline, FittedField
from features.prepare import EDGES
from features.profile import drift as field_drift
from features.stats import Edges, bins_of, num_bins
from serving.bundle import Bundle
from training.evaluation.results import Drift, FloatN

SCORE_BINS = 20
SAMPLE = 50_000  # training rows that are scored

CountK = npt.NDArray[np.floating] | npt.NDArray[np.integer]  # floating where rows have weights


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
    edges = _edges(pipeline, train)
    found_K = {field.name: _counted(field, table, edges) for field in pipeline.fields}
    expected_K = {field.name: np.zeros(num_bins(field, edges)) for field in pipeline.fields}
    for group in train.row_groups:
        part = train.read(group, [*pipeline.names, LABEL])
        weight_N = _stands_for(part, rate)
        for field in pipeline.fields:
            expected_K[field.name] += _counted(field, part, edges, weight_N)
    return {name: field_drift(_whole(expected_K[name]), _whole(found_K[name])) for name in pipeline.names}


def _edges(pipeline: FeaturePipeline, train: SplitFiles) -> Edges:
    """Where the bins of value fields begin, as `features.prepare` has it."""
    names = [field.name for field in pipeline.fields if isinstance(field.encoder, Scale)]
    counts = {name: NumberCounts() for name in names}
    for group in train.row_groups if names else ():
        part = train.read(group, names)
        for name in names:
            counts[name].add(NumberCounts.of(part[name].combine_chunks().cast(pa.float64())))
    return {name: np.unique(numbers.quantiles(EDGES)) for name, numbers in counts.items()}


def _counted(field: FittedField, table: pa.Table, edges: Edges, weight_N: FloatN | None = None) -> CountK:
    """Rows, or items of lists, by bin."""
    values, length_N = flat_values(table[field.name].combine_chunks())
    bin_I, _ = bins_of(field, values, edges)
    weight_I = weight_N if weight_N is None or length_N is None else np.repeat(weight_N, length_N)
    return np.bincount(bin_I, weight_I, minlength=num_bins(field, edges))


def _stands_for(table: pa.Table, rate: float) -> FloatN:
    """How many rows each training row stands for."""
    return np.where(table[LABEL].to_numpy() > 0, 1.0, 1 / rate)


def _score(bundle: Bundle, score_N: FloatN, train: SplitFiles, rate: float, seed: int) -> float | None:
    sample = _sample(train, [*bundle.pipeline.names, LABEL], seed)
    if not sample.num_rows or not len(score_N):
        return None
    train_S, weight_S = bundle.scorer.score_encoded(sample), _stands_for(sample, rate)
    levels = np.arange(1, SCORE_BINS) / SCORE_BINS
    starts = np.unique(np.quantile(train_S, levels, weights=weight_S, method="inverted_cdf"))
    expected_K, found_K = (
        np.bincount(np.searchsorted(starts, score, side="right"), weight, minlength=len(starts) + 1)
        for score, weight in ((train_S, weight_S), (score_N, None))
    )
    return psi(_whole(expected_K), _whole(found_K))


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


def _whole(count_K: CountK) -> npt.NDArray[np.int64]:
    return np.rint(count_K).astype(np.int64)
