"""The evaluation report: one HTML file that needs nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jinja2

from features.metrics import auc_standard_error
from training.pictures import calibration_picture, histogram_picture, roc_picture

if TYPE_CHECKING:
    from training.evaluate import Evaluation

_COLUMNS = {
    "auc": "AUC",
    "logloss": "Log loss",
    "ne": "Normalized entropy",
    "calibration": "Calibration",
    "ece": "ECE",
    "gauc": "Grouped AUC",
    "pr_auc": "PR AUC",
    "brier": "Brier",
}


def render(evaluation: Evaluation) -> str:
    """The report's HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["number"] = number
    label_N, scores = evaluation.label_N, evaluation.scores
    model = next(iter(scores))
    both = bool(label_N.min() != label_N.max())
    informative = {name: score_N for name, score_N in scores.items() if score_N.min() != score_N.max()}
    return environment.get_template("report.html").render(
        evaluation=evaluation,
        manifest=evaluation.bundle.manifest,
        columns=_COLUMNS,
        verdict=_verdict(evaluation.metrics),
        caution=_caution(evaluation),
        rows=len(label_N),
        clicks=int(label_N.sum()),
        roc=roc_picture(label_N, informative) if both else None,
        calibration=calibration_picture(label_N, informative),
        histogram=histogram_picture(label_N, scores[model]),
        model=model,
    )


def number(value: float | None) -> str:
    """Four decimals, or a dash for what is not defined."""
    return "–" if value is None else f"{value:.4f}"


def _verdict(metrics: dict[str, dict[str, float | None]]) -> str:
    """A plain sentence on where the model stands beside the baselines."""
    (model, own), *others = metrics.items()
    if not others:
        return "There are no baselines beside this model: give prepared data to see them."
    sentences = []
    for name, theirs in others:
        better = [
            _better(own["auc"], theirs["auc"], "AUC", 1),
            _better(own["logloss"], theirs["logloss"], "log loss", -1),
        ]
        sentences.append(f"Against the {name}, {model} has {' and '.join(better)}.")
    return " ".join(sentences)


def _caution(evaluation: Evaluation) -> str:
    """How far an AUC on so many rows is from the truth by chance alone."""
    own = next(iter(evaluation.metrics.values()))["auc"]
    if own is None:
        return "With one class only among the rows, there is no AUC."
    clicks = int(evaluation.label_N.sum())
    error = auc_standard_error(own, clicks, len(evaluation.label_N) - clicks)
    return f"The differences are not tested for significance; an AUC on these rows has a standard error of {error:.4f}."


def _better(own: float | None, theirs: float | None, what: str, sign: int) -> str:
    if own is None or theirs is None:
        return f"no comparable {what}"
    word = "better" if sign * (own - theirs) > 0 else "worse" if own != theirs else "the same"
    return f"{word} {what} ({own:.4f} to {theirs:.4f})"
