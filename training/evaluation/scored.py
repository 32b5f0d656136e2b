"""A scorer's metrics on encoded rows."""

import pyarrow as pa

from features.dataset import LABEL, groups_of
from features.metrics import score_metrics
from serving.scorer import Scorer


def metrics_of(scorer: Scorer, table: pa.Table) -> dict[str, float | None]:
    """`score_metrics` of what is served: rankings by the scores before calibration, all else by those after."""
    ranking_N, score_N = scorer.ranked_and_served(table)
    return score_metrics(table[LABEL].to_numpy(), score_N, groups_of(table), ranking_N)
