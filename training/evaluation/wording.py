"""What an evaluation says in sentences, and what its metrics are called."""

from dataclasses import dataclass

from training.evaluation.findings import Evaluation, Findings
from training.evaluation.results import Difference, Estimate, Slice
from training.evaluation.slices import worse
from training.numbers import digits_of, number, signed

METRICS = {
    "auc": "AUC",
    "logloss": "Log loss",
    "ne": "Normalized entropy",
    "rig": "Information gain",
    "calibration": "Calibration",
    "ece": "ECE",
    "gauc": "Grouped AUC",
    "ndcg@10": "NDCG@10",
    "mrr": "MRR",
    "recall@10": "Recall@10",
    "coverage": "Coverage",
    "pr_auc": "PR AUC",
    "brier": "Brier",
}
SAMPLED = (
    "Negatives are missing among these rows and the scores are for all rows, so calibration and ECE are not judged, "
    "and log loss is not that of all rows."
)
_TILES = ("auc", "logloss", "calibration")


@dataclass(frozen=True)
class Tile:
    """One of the few numbers that a decision needs: a metric of the model, and what it means here."""

    metric: str
    title: str
    estimate: Estimate
    meaning: str


def titles(evaluation: Evaluation) -> dict[str, str]:
    """Names of the metrics that are defined for any scorer, those that decide first."""
    defined = [
        key
        for key in evaluation.metrics[evaluation.model]
        if any(m[key] is not None for m in evaluation.metrics.values())
    ]
    known = [key for key in METRICS if key in defined]
    return {key: METRICS.get(key, key) for key in (*known, *(key for key in defined if key not in METRICS))}


def verdict(evaluation: Evaluation) -> list[str]:
    """What a person should take from it: comparisons, with a rival the slices that got worse, and the calibration."""
    findings = evaluation.findings
    assert findings is not None  # there is no verdict without
    compared = findings.comparisons
    if evaluation.rival is not None:
        sentences = [compared[0].sentence, _slices(findings.slices)]
    else:
        sentences = [found.sentence for found in reversed(compared)]  # the best baseline is the last
    if evaluation.clicks in (0, evaluation.rows):
        sentences.append("With one class only among the rows, there is no AUC.")
    if evaluation.sampled:
        return [*sentences, SAMPLED]
    return [*sentences, *_calibration(evaluation.model, findings.estimates[evaluation.model]["calibration"])]


def tiles(evaluation: Evaluation, findings: Findings) -> list[Tile]:
    """The numbers at the top; metrics that are not defined have none."""
    own = findings.estimates[evaluation.model]
    keys = [key for key in _TILES if key != "calibration" or not evaluation.sampled]
    found = [Tile(key, METRICS[key], own[key], _meaning(key, evaluation)) for key in keys]
    ranked = next((key for key in ("ndcg@10", "gauc") if own.get(key, Estimate(None)).value is not None), None)
    if ranked is not None:
        found.append(Tile(ranked, METRICS[ranked], own[ranked], _meaning(ranked, evaluation)))
    return [tile for tile in found if tile.estimate.value is not None]


def _slices(slices: list[Slice]) -> str:
    tested = sum(one.verdict is not None for one in slices)
    if not tested:
        return "No part of the rows is large enough to be tested on its own."
    left = f"; {len(slices) - tested} more are of too few groups to test" if tested < len(slices) else ""
    found = worse(slices)
    if not found:
        return f"None of {tested} slices tested got significantly worse{left}."
    named = ", ".join(one.name for one in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"{len(found)} of {tested} slices tested got significantly worse: {named}{more}{left}."


def _calibration(model: str, found: Estimate) -> list[str]:
    """Whether the scores are probabilities on the whole."""
    if found.value is None:
        return []
    if found.low is None or found.high is None:
        return [
            f"{model} predicts {number(found.value, 2)} times the clicks that there are; of so few groups, or rows, "
            "it is not tested whether by chance."
        ]
    if found.low <= 1 <= found.high:
        return [f"{model} predicts as many clicks as there are, as far as these rows can tell."]
    much, word = 100 * abs(found.value - 1), "more" if found.value > 1 else "fewer"
    return [f"{model} predicts {much:.1f} % {word} clicks than there are."]


def _meaning(key: str, evaluation: Evaluation) -> str:
    value = evaluation.metrics[evaluation.model]
    group = evaluation.bundle.schema.group
    if key == "auc":
        return f"of pairs of a click and another row, {100 * (value['auc'] or 0):.1f} % are in the right order"
    if key == "logloss":
        ne = value["ne"]
        if ne is None or evaluation.sampled:
            return "mean negative log-likelihood of the labels"
        return f"{100 * abs(1 - ne):.1f} % {'below' if ne <= 1 else 'above'} that of always saying the click rate"
    if key == "calibration":
        about = "" if evaluation.rival is None else ", Δ is of the distances from it"
        return f"predicted clicks over observed ones; 1 is right{about}"
    return f"order within a {group}, mean; 1 is best" if key == "ndcg@10" else f"AUC within a {group}, mean over rows"


def with_interval(found: Estimate | Difference) -> str:
    """A value with its interval, as tables in a terminal have it; a difference with its sign."""
    shown, to = (number, "–") if isinstance(found, Estimate) else (signed, " to ")
    digits = digits_of(found.low, found.high)
    if found.low is None or found.high is None:
        return shown(found.value, digits)
    return f"{shown(found.value, digits)} ({shown(found.low, digits)}{to}{shown(found.high, digits)})"
