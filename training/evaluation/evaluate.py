"""A model's metrics on labelled rows, beside a rival's and baselines'."""

from collections.abc import Mapping
from typing import Any

from features.dataset import LABEL, groups_of
from features.encoders import FIRST, Managed, Vocabulary
from features.errors import InputError
from features.id_maps import with_rows
from features.metrics import areas, auc, score_metrics
from features.metrics_curves import EXACT_ROWS
from serving.bundle import Bundle
from training.evaluation.findings import MODEL, Evaluation, FloatN, Subject
from training.evaluation.rows import Rows, rows_of_dataset, rows_of_files, same_rows_of_files

__all__ = [
    "MODEL",
    "Evaluation",
    "Rows",
    "Subject",
    "evaluate",
    "rows_of_dataset",
    "rows_of_files",
    "same_rows_of_files",
]


def evaluate(
    bundle: Bundle, rows: Rows, baselines: Mapping[str, FloatN], *, name: str = MODEL, rival: Subject | None = None
) -> Evaluation:
    """Score the rows and compute every metric.

    Args:
        bundle: the model.
        rows: in its encoding.
        baselines: other scores of the same rows.
        name: what the model is called beside the others.
        rival: another model, with the same rows in its encoding.

    Raises:
        InputError: there are no rows.
    """
    label_N = rows.table[LABEL].to_numpy()
    if len(label_N) == 0:
        raise InputError(f"{rows.source} has no rows to evaluate")
    subjects = (Subject(name, bundle, rows.table), *([rival] if rival else []))
    scores: dict[str, FloatN] = {}
    uncalibrated: dict[str, FloatN] = {}
    for subject in subjects:
        scorer = subject.bundle.scorer
        ranking_N, scores[subject.name] = scorer.ranked_and_served(subject.table)
        if scorer.calibration.kind != "none":
            uncalibrated[subject.name] = ranking_N
    scores |= baselines
    rankings, group_N = scores | uncalibrated, groups_of(rows.table)
    return Evaluation(
        subjects=subjects,
        source=rows.source,
        label_N=label_N,
        group_N=group_N,
        scores=scores,
        uncalibrated=uncalibrated,
        metrics={who: score_metrics(label_N, score_N, group_N, rankings[who]) for who, score_N in scores.items()},
        metrics_before={who: score_metrics(label_N, score_N, group_N) for who, score_N in uncalibrated.items()},
        by_familiarity=_by_familiarity(subjects[0], label_N, rankings),
        bounds=_bounds(label_N, rankings),
        sampled=rows.sampled,
    )


def _bounds(label_N: FloatN, rankings: dict[str, FloatN]) -> dict[str, dict[str, float]]:
    """Errors of areas under curves that are binned, as they are of very many rows."""
    if len(label_N) <= EXACT_ROWS:
        return {}
    found = {who: areas(label_N, ranking_N, EXACT_ROWS) for who, ranking_N in rankings.items()}
    return {who: {"auc": roc.bound, "pr_auc": precision.bound} for who, (roc, precision) in found.items()}


def _by_familiarity(subject: Subject, label_N: FloatN, rankings: dict[str, FloatN]) -> dict[str, Any]:
    """AUC for groups (users) that training knew and for new ones apart; {} unless the group is a field with ids."""
    bundle = subject.bundle
    group = bundle.schema.group
    field = next((field for field in bundle.pipeline.fields if field.name == group), None)
    if field is None or not isinstance(field.encoder, Vocabulary | Managed) or field.spec.type == "list":
        return {}  # only a vocabulary, or a map of managed ids, tells the known from the new
    known_N = with_rows(subject.table, bundle.pipeline, bundle.scorer.id_maps)[group].to_numpy() >= FIRST
    parts = {f"known {group}": known_N, f"new {group}": ~known_N}
    return {
        name: {
            "rows": int(part_N.sum()),
            "auc": {who: auc(label_N[part_N], ranking_N[part_N]) for who, ranking_N in rankings.items()},
        }
        for name, part_N in parts.items()
    }
