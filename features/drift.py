"""How far rows are from those that a model was trained on: counts over bins that stay, and their stability index.

Legend: N rows, I items of lists or rows, K bins of `features.stats`, G groups that drift is told over: missing, never
seen, the most frequent bins of training one by one, all others.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import flat_values
from features.counting import NumberCounts
from features.dataset import LABEL, SplitFiles
from features.encoders import FIRST, MISSING, UNKNOWN, Scale
from features.metrics import psi
from features.pipeline import FeaturePipeline, FittedField
from features.stats import Edges, bins_of, num_bins

LEVELS = np.arange(1, 20) / 20  # where the bins of value fields begin, as quantiles
TOLD_APART = 20  # bins
DRIFT = 0.2  # PSI above which a field has drifted, by common usage

CountK = npt.NDArray[np.floating] | npt.NDArray[np.integer]  # floating where rows have weights
FloatN = npt.NDArray[np.floating]
IndexK = npt.NDArray[np.int64]


def top_bins(train_K: CountK) -> IndexK:
    """The bins that are told apart: the most frequent in training, of those that are values."""
    return np.argsort(-train_K[FIRST:], kind="stable")[:TOLD_APART] + FIRST


def group_of_bins(top: IndexK, bins: int) -> IndexK:
    """The group [K] of each bin: 0 missing, 1 never seen, from 2 on those of `top`, then one for all others."""
    group_K = np.full(bins, FIRST + len(top), np.int64)
    group_K[[MISSING, UNKNOWN]] = 0, 1
    group_K[top] = FIRST + np.arange(len(top))
    return group_K


def grouped(count_K: CountK, top: IndexK) -> IndexK:
    """Whole counts [G] by group."""
    return whole(np.bincount(group_of_bins(top, len(count_K)), count_K, FIRST + len(top) + 1))


def stability_index(train_K: CountK, found_K: CountK) -> float | None:
    """PSI from training over the groups, of whole counts by bin; None where either has no rows."""
    if not train_K.sum() or not found_K.sum():
        return None
    top = top_bins(train_K)
    return psi(grouped(train_K, top), grouped(found_K, top))


def edges_of(pipeline: FeaturePipeline, train: SplitFiles) -> Edges:
    """Where the bins of value fields begin: the encoded vigintiles of the training rows."""
    names = [field.name for field in pipeline.fields if isinstance(field.encoder, Scale)]
    counts = {name: NumberCounts() for name in names}
    for group in train.row_groups if names else ():
        part = train.read(group, names)
        for name in names:
            counts[name].add(NumberCounts.of(part[name].combine_chunks().cast(pa.float64())))
    return {name: np.unique(numbers.quantiles(LEVELS)) for name, numbers in counts.items()}


def counted(field: FittedField, table: pa.Table, edges: Edges, weight_N: FloatN | None = None) -> CountK:
    """Rows [K], or items of lists, by bin."""
    values, length_N = flat_values(table[field.name].combine_chunks())
    bin_I, _ = bins_of(field, values, edges)
    weight_I = weight_N if weight_N is None or length_N is None else np.repeat(weight_N, length_N)
    return np.bincount(bin_I, weight_I, minlength=num_bins(field, edges))


def counts_of_split(pipeline: FeaturePipeline, train: SplitFiles, edges: Edges, rate: float) -> dict[str, CountK]:
    """Counts [K] of each field's bins; a negative counts for the 1 / `rate` rows that it stands for."""
    found: dict[str, CountK] = {field.name: np.zeros(num_bins(field, edges)) for field in pipeline.fields}
    for group in train.row_groups:
        part = train.read(group, [*pipeline.names, LABEL])
        weight_N = stands_for(part, rate)
        for field in pipeline.fields:
            found[field.name] = found[field.name] + counted(field, part, edges, weight_N)
    return {name: whole(count_K) for name, count_K in found.items()}


def stands_for(table: pa.Table, rate: float) -> FloatN:
    """How many rows each row stands for where negatives are kept at a share."""
    return np.where(table[LABEL].to_numpy() > 0, 1.0, 1 / rate)


def score_starts(score_N: FloatN, weight_N: FloatN | None = None) -> FloatN:
    """Where the bins of scores begin but the first: at their vigintiles, equal ones once."""
    return np.unique(np.quantile(score_N, LEVELS, weights=weight_N, method="inverted_cdf"))


def counted_scores(score_N: FloatN, starts: FloatN, weight_N: FloatN | None = None) -> npt.NDArray[np.int64]:
    """Rows by bin of the score."""
    return whole(np.bincount(np.searchsorted(starts, score_N, side="right"), weight_N, minlength=len(starts) + 1))


def whole(count_K: CountK) -> npt.NDArray[np.int64]:
    """Counts without the fractions that weights give them."""
    return np.rint(count_K).astype(np.int64)
