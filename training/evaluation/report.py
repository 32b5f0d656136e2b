"""The evaluation report: one HTML file that needs nothing else."""

from typing import Any

import jinja2
import numpy as np

from features.drift import DRIFT
from training.evaluation.curves import Curves
from training.evaluation.findings import Evaluation, Findings
from training.evaluation.pictures import (
    SOME_PSI,
    drift_picture,
    histogram_picture,
    importance_picture,
    mask_picture,
    reliability_picture,
    roc_picture,
    slices_picture,
)
from training.evaluation.results import Drift, Slice
from training.evaluation.slices import worse
from training.evaluation.wording import SAMPLED, tiles, titles, verdict
from training.numbers import digits_of, number, p_value, signed

_FOREST = 24  # slices in the picture of differences: what does not fit on a page is in the tables
_DRIFTS = 20  # fields in the picture of drift
_RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # false positive rates in the table behind the ROC curves
MARKS = {"better": "▲ better", "worse": "▼ worse", "not told apart": "○ not told apart"}


def render(evaluation: Evaluation, findings: Findings, curves: Curves) -> str:
    """The report's HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "p": p_value, "bytes": size}
    environment.globals |= {"digits": digits_of, "marks": MARKS}
    rival, forest = evaluation.rival, _forest(findings.slices)
    return environment.get_template("report.html").render(
        evaluation=evaluation,
        findings=findings,
        curves=curves,
        against=next((found for found in findings.comparisons if found.second == rival), None),
        verdict=verdict(evaluation),
        tiles=tiles(evaluation, findings),
        titles=titles(evaluation),
        worse=worse(findings.slices),
        tested=sum(one.verdict is not None for one in findings.slices),
        bad=_is_bad(evaluation, findings),
        sampled=SAMPLED if evaluation.sampled else None,
        slices=by_field(findings.slices),
        rates=_true_rates(curves),
        forest=forest,
        pictures=_pictures(findings, curves, forest),
        drifts=_largest(findings.drift),
        psi_bounds=(SOME_PSI, DRIFT),
    )


def _is_bad(evaluation: Evaluation, findings: Findings) -> bool:
    """Whether the model is worse than its rival in log loss, AUC or a slice."""
    against = next((found for found in findings.comparisons if found.second == evaluation.rival), None)
    if against is None:
        return False
    verdicts = {against.differences[key].verdict for key in ("logloss", "auc")}
    return bool(worse(findings.slices)) or "worse" in verdicts


def _pictures(findings: Findings, curves: Curves, forest: list[Slice]) -> dict[str, Any]:
    """SVG by the section that shows it; None, or nothing, where there is nothing to draw."""
    drifts = _largest(findings.drift)
    return {
        "slices": slices_picture(forest, "Δ log loss") if forest else None,
        "roc": roc_picture(curves.roc) if curves.roc else None,
        "reliability": reliability_picture(curves.reliability) if curves.reliability else None,
        "histogram": {name: histogram_picture(found) for name, found in curves.histogram.items()},
        "importance": importance_picture(
            {name: sorted(found, key=lambda one: -one.logloss_rise) for name, found in findings.importance.items()},
            "Rise of log loss when shuffled",
        )
        if any(findings.importance.values())
        else None,
        "masks": {name: mask_picture(found) for name, found in findings.masks.items() if found.mean_BF.size},
        "drift": drift_picture(dict(list(drifts.items())[:_DRIFTS]), "Population stability index") if drifts else None,
    }


def by_field(slices: list[Slice]) -> dict[str, list[Slice]]:
    """Slices by what they are slices by, in the order they were found in."""
    found: dict[str, list[Slice]] = {}
    for one in slices:
        found.setdefault(one.field, []).append(one)
    return found


def _forest(slices: list[Slice]) -> list[Slice]:
    """The slices whose differences are drawn: those told apart first, then the largest differences, worst on top."""
    compared = [one for one in slices if one.logloss is not None and one.logloss.low is not None]
    told = [one for one in compared if one.verdict in ("better", "worse")]
    rest = [one for one in compared if one.verdict not in ("better", "worse")]
    chosen = [one for part in (told, rest) for one in sorted(part, key=lambda one: -abs(_difference(one)))]
    return sorted(chosen[:_FOREST], key=_difference, reverse=True)


def _difference(one: Slice) -> float:
    assert one.logloss is not None
    return one.logloss.value or 0.0


def _largest(drift: Drift | None) -> dict[str, float]:
    """Fields whose drift is known, from the most to the least."""
    known = {name: value for name, value in drift.fields.items() if value is not None} if drift else {}
    return dict(sorted(known.items(), key=lambda item: -item[1]))


def _true_rates(curves: Curves) -> dict[float, dict[str, float]]:
    """True positive rates by false positive rate and scorer, between the points of the curves."""
    return {
        rate: {name: float(np.interp(rate, false, true)) for name, (false, true) in curves.roc.items()}
        for rate in _RATES
    }


def size(count: int) -> str:
    """Bytes as people read them."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
