"""What lies behind an evaluation's metrics: intervals, comparisons, slices, what the models look at, drift and cost."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from features.dataset import SplitFiles
from training.evaluation.comparison import Assessment, assess
from training.evaluation.cost import cost
from training.evaluation.drift import drift
from training.evaluation.findings import Evaluation, Findings, Resampled, Subject
from training.evaluation.intervals import REPLICATES
from training.evaluation.looks import importance
from training.evaluation.masks import mask_statistics
from training.evaluation.names import Known
from training.evaluation.results import Comparison, Drift, Slice
from training.evaluation.slices import slices

T = TypeVar("T")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Seen:
    """What training saw, where it is at hand.

    Attributes:
        train: the training split in the models' encoding.
        split: the name of the evaluated split.
        known: values by which ids that are hashes are named.
    """

    train: SplitFiles | None
    split: str
    known: Known


def examine(
    evaluation: Evaluation, seen: Seen, *, replicates: int = REPLICATES, progress: Progress = lambda *_: None
) -> Evaluation:
    """The evaluation with its findings.

    Args:
        evaluation: the scores.
        seen: what training saw.
        replicates: bootstrap draws.
        progress: called with a stage's name, and how much of how many parts is done.
    """
    label_N, group_N = evaluation.label_N, evaluation.group_N
    assessed = assess(
        label_N,
        evaluation.scores,
        group_N,
        rankings=evaluation.rankings,
        metrics=evaluation.metrics,
        replicates=replicates,
        progress=partial(progress, "intervals"),
    )

    def each(stage: str, find: Callable[[Subject], T]) -> dict[str, T]:
        found: dict[str, T] = {}
        for number, subject in enumerate(evaluation.subjects):
            progress(stage, number, len(evaluation.subjects))
            found[subject.name] = find(subject)
        progress(stage, len(evaluation.subjects), len(evaluation.subjects))
        return found

    masks = each("masks", lambda one: mask_statistics(one.bundle, one.table))
    findings = Findings(
        resampled=Resampled(assessed.replicates, evaluation.bundle.schema.group if group_N is not None else None),
        estimates=assessed.estimates,
        comparisons=_comparisons(assessed, evaluation.sampled),
        slices=_slices(evaluation, seen, progress),
        importance=each("importance", lambda one: importance(one.bundle, one.table, label_N)),
        masks={name: found for name, found in masks.items() if found is not None},
        drift=_drift(evaluation, seen, progress),
        cost=each("latency", lambda one: cost(one.bundle, one.table)),
    )
    return replace(evaluation, findings=findings)


def _comparisons(assessed: Assessment, sampled: bool) -> list[Comparison]:
    """Without a judgement of probabilities where negatives are missing among the rows."""
    left_out = {"calibration", "ece"} if sampled else set()
    return [
        replace(one, differences={name: found for name, found in one.differences.items() if name not in left_out})
        for one in assessed.comparisons.values()
    ]


def _slices(evaluation: Evaluation, seen: Seen, progress: Progress) -> list[Slice]:
    """Of the rows as the model encodes them, and the models' scores alone."""
    progress("slices", 0, 1)
    first = evaluation.subjects[0]
    scores, rankings = (
        {subject.name: by_name[subject.name] for subject in evaluation.subjects}
        for by_name in (evaluation.scores, evaluation.rankings)
    )
    pair = None if evaluation.rival is None else (first.name, evaluation.rival)
    found = slices(
        first.bundle,
        first.table,
        evaluation.label_N,
        scores,
        rankings=rankings,
        pair=pair,
        train=seen.train,
        known=seen.known,
    )
    progress("slices", 1, 1)
    return found


def _drift(evaluation: Evaluation, seen: Seen, progress: Progress) -> Drift | None:
    """Of the model: a rival on the same prepared rows has the same fields."""
    progress("drift", 0, 1)
    first = evaluation.subjects[0]
    found = drift(first.bundle, first.table, evaluation.scores[first.name], seen.train, seen.split)
    progress("drift", 1, 1)
    return found
