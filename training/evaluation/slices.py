"""How models do on parts of the rows, and on which of them one is told apart from another.

Legend: N rows, P rows of a part.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.dataset import SplitFiles, groups_of
from features.metrics import auc, log_losses
from features.metrics_input import BoolN
from serving.bundle import Bundle
from training.evaluation.activity import by_activity
from training.evaluation.clusters import clusters_of, holm
from training.evaluation.cuts import Cut, IndexN, by_time, by_value
from training.evaluation.intervals import verdict
from training.evaluation.names import Known
from training.evaluation.paired import mean_difference
from training.evaluation.results import Difference, FloatN, Slice

TOP = 10
MIN_ROWS, MIN_EACH = 50, 5


def slices(
    bundle: Bundle,
    table: pa.Table,
    label_N: FloatN,
    scores: Mapping[str, FloatN],
    *,
    rankings: Mapping[str, FloatN] | None = None,
    pair: tuple[str, str] | None = None,
    train: SplitFiles | None = None,
    known: Known = MappingProxyType({}),
    top: int = TOP,
    min_rows: int = MIN_ROWS,
    min_each: int = MIN_EACH,
) -> list[Slice]:
    """Metrics on parts of the rows: values of every field, activity bands, periods of time.

    A part needs `min_rows` rows and `min_each` of them clicked and not clicked, and is left out where it is all rows.

    Args:
        bundle: what has encoded the rows.
        table: the rows, with their group and time.
        label_N: 0 or 1.
        scores: probabilities of the same rows, by model.
        rankings: what orders the rows, of models where that is not the probabilities: AUC goes by it.
        pair: two of the models: on every slice the first is compared with the second.
        train: the training split in the same encoding; without it there are no activity bands.
        known: values by which hashed and managed ids are named (`training.evaluation.names.known_values`).
        top: values, or ranges of a number, of each field.
        min_rows: see above.
        min_each: see above.
    """
    measure = _Measure.of(label_N, scores, {**scores, **(rankings or {})}, groups_of(table), pair)
    found: list[Slice] = []
    for cut in _cuts(bundle, table, train, known, top):
        for kind, name, row_P in cut.parts():
            rows, clicks = len(row_P), int(np.count_nonzero(measure.click_N[row_P]))
            if min_rows <= rows < len(label_N) and min(clicks, rows - clicks) >= min_each:
                found.append(measure(Slice(cut.field, kind, name, rows, clicks, {}), row_P))
    return _corrected(_without_repeats(found))


def worse(found: Sequence[Slice]) -> list[Slice]:
    """The slices on which the first model is worse, p being corrected for the number tested; the worst first."""
    return sorted((s for s in found if s.verdict == "worse"), key=lambda s: -_delta(s))


def _delta(part: Slice) -> float:
    difference = part.logloss
    assert difference is not None  # there is no verdict without
    assert difference.value is not None
    return difference.value


def _cuts(bundle: Bundle, table: pa.Table, train: SplitFiles | None, known: Known, top: int) -> Iterator[Cut]:
    bands = {cut.field: cut for cut in by_activity(bundle, table, train)} if train is not None else {}
    for field in bundle.pipeline.fields:
        yield by_value(field, table, bundle.scorer.id_maps, known, top)
        if field.name in bands:
            yield bands.pop(field.name)
    yield from bands.values()
    time = by_time(table)
    if time is not None:
        yield time


def _without_repeats(found: list[Slice]) -> list[Slice]:
    """Without the never-seen of a field all of whose cold ids are such: two names of the same rows."""
    cold = {(s.field, s.rows, s.clicks) for s in found if s.kind == "activity"}
    return [s for s in found if s.kind != "unknown" or (s.field, s.rows, s.clicks) not in cold]


def _corrected(found: list[Slice]) -> list[Slice]:
    """With the p-values of all tests corrected together, and their verdicts; slices without a test have none."""
    tests = [s.logloss.p for s in found if s.logloss is not None and s.logloss.p is not None]
    corrected = iter(holm(tests))
    told: list[Slice] = []
    for part in found:
        if part.logloss is None or part.logloss.p is None:
            told.append(part)
            continue
        p = next(corrected)
        told.append(replace(part, p_corrected=p, verdict=verdict("logloss", _delta(part), p)))
    return told


@dataclass(frozen=True)
class _Measure:
    """What is computed once for all slices: every row's log loss, in nats, by model, and its cluster."""

    click_N: BoolN
    scores: Mapping[str, FloatN]
    rankings: Mapping[str, FloatN]
    loss: Mapping[str, FloatN]
    pair: tuple[str, str] | None
    cluster_N: npt.NDArray[np.integer]

    @classmethod
    def of(
        cls,
        label_N: FloatN,
        scores: Mapping[str, FloatN],
        rankings: Mapping[str, FloatN],
        group_N: npt.NDArray[np.generic] | None,
        pair: tuple[str, str] | None,
    ) -> "_Measure":
        cluster_N = clusters_of(group_N, len(label_N)) if pair else np.empty(0, np.int64)
        click_N = label_N > 0
        loss = {name: log_losses(click_N, score_N) for name, score_N in scores.items()}
        return cls(click_N, scores, rankings, loss, pair, cluster_N)

    def __call__(self, part: Slice, row_P: IndexN) -> Slice:
        """The slice with its metrics and difference."""
        click_P, metrics = self.click_N[row_P], {}
        for name, score_N in self.scores.items():
            score_P = score_N[row_P]
            metrics[name] = {
                "auc": auc(click_P, self.rankings[name][row_P]),
                "logloss": float(self.loss[name][row_P].mean()),
                "calibration": float(score_P.sum(dtype=np.float64)) / part.clicks if part.clicks else None,
            }
        return replace(part, metrics=metrics, logloss=self._difference(row_P))

    def _difference(self, row_P: IndexN) -> Difference | None:
        if self.pair is None:
            return None
        first, second = (self.loss[name][row_P] for name in self.pair)
        return mean_difference(first - second, self.cluster_N[row_P])
