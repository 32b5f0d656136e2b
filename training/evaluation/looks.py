"""What a model looks at: how much worse its scores are without what a field says (Breiman, Random Forests, 2001)."""

import numpy as np
import pyarrow as pa

from features.metrics import auc, logloss
from serving.bundle import Bundle
from training.evaluation.results import FieldImportance, FloatN

REPEATS = 3
LEAST, MOST = 2_000, 20_000  # rows
SCORED = 300_000  # rows in all: a wide network takes minutes for more


def sampled(table: pa.Table, most: int, seed: int) -> tuple[pa.Table, np.ndarray]:
    """At most so many random rows, in their order, and their places [S]."""
    row_S = np.arange(table.num_rows)
    if table.num_rows > most:
        row_S = np.sort(np.random.default_rng(seed).choice(table.num_rows, most, replace=False))
    return table.take(pa.array(row_S)), row_S


def importance(
    bundle: Bundle, table: pa.Table, label_N: FloatN, *, rows: int | None = None, repeats: int = REPEATS, seed: int = 0
) -> list[FieldImportance]:
    """Permutation importance of each field, in the pipeline's order, by the scores that are served.

    A field's encoded column is shuffled over the rows, whole lists with lists, which leaves the field's own
    distribution and takes its relation to the label and to other fields. A field that repeats another loses little: the
    model may read the other. A cross is a column of its own: shuffling one of the fields that it combines leaves it as
    it is. A training-only field is not read when serving, and loses nothing.

    Args:
        bundle: what has encoded the rows.
        table: the rows.
        label_N: 0 or 1.
        rows: that are used, drawn at random where there are more; by default 2,000 to 20,000, the fewer the more fields
            and members there are.
        repeats: shuffles of each field, by which the spread is told (0 with a single one).
        seed: of the sample and of the shuffles.
    """
    if rows is None:
        passes = repeats * len(bundle.pipeline.fields) * len(bundle.scorer.models)
        rows = min(max(SCORED // passes, LEAST), MOST)
    sample, row_S = sampled(table.select(bundle.pipeline.names), rows, seed)
    label_S, random = label_N[row_S], np.random.default_rng(seed + 1)
    order_RS = [random.permutation(len(label_S)) for _ in range(repeats)]  # the same for all fields
    before = _quality(bundle, sample, label_S)
    return [_lost(bundle, sample, label_S, name, order_RS, before) for name in bundle.pipeline.names]


def _quality(bundle: Bundle, table: pa.Table, label_S: FloatN) -> tuple[float | None, float]:
    ranking_S, score_S = bundle.scorer.ranked_and_served(table)
    return auc(label_S, ranking_S), logloss(label_S, score_S)


def _lost(
    bundle: Bundle,
    table: pa.Table,
    label_S: FloatN,
    name: str,
    order_RS: list[np.ndarray],
    before: tuple[float | None, float],
) -> FieldImportance:
    column, place = table[name].combine_chunks(), table.column_names.index(name)
    after = [
        _quality(bundle, table.set_column(place, name, column.take(pa.array(order_S))), label_S) for order_S in order_RS
    ]
    rises = [loss - before[1] for _, loss in after]
    drops = [before[0] - area for area, _ in after if area is not None and before[0] is not None]
    return FieldImportance(
        field=name,
        auc_drop=float(np.mean(drops)) if drops else None,
        auc_drop_sd=_deviation(drops) if drops else None,
        logloss_rise=float(np.mean(rises)),
        logloss_rise_sd=_deviation(rises),
    )


def _deviation(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
