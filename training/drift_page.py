"""The drift report: one HTML file that needs nothing else."""

from datetime import UTC, datetime

import jinja2
import numpy as np
from matplotlib.artist import Artist

from serving.bundle import Bundle
from serving.monitoring.drift import Drifted, DriftResult
from serving.monitoring.reference import Reference
from training.drift_names import group_names, score_names
from training.numbers import number, p_value
from training.pictures import COLOURS, DIM, legend, row_axes, svg

_FIELDS = 24  # in the picture of fields
_SHOWN = 6  # fields whose values are drawn
_GROUPS = 10  # values of one
_ALARM, _STILL, _BEFORE = "#b3470a", COLOURS[0], "#b6bcc3"
MARKS = {"drifted": "▲ drifted", "stable": "○ stable", "not judged": "– not judged"}


def render(bundle: Bundle, result: DriftResult, reference: Reference) -> str:
    """The report's HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "p": p_value, "share": share}
    by_shift = sorted(result.fields, key=lambda one: -one.shift.beyond_chance)
    by_name = {field.name: field for field in bundle.pipeline.fields}
    shown = [one for one in by_shift if one.verdict == "drifted"] or by_shift[:1]
    names = {one.name: group_names(by_name[one.name], reference.fields[one.name]) for one in shown[:_SHOWN]}
    return environment.get_template("drift.html").render(
        result=result,
        sentences=sentences(result),
        times=None if result.times is None else tuple(_moment(seconds) for seconds in result.times),
        fields=by_shift,
        marks=MARKS,
        fields_picture=shift_picture([*by_shift[:_FIELDS]], result.threshold),
        score_names=score_names(reference.score.starts),
        score_picture=shares_picture(result.score, score_names(reference.score.starts), in_order=True),
        shown=[(one, names[one.name], shares_picture(one, names[one.name])) for one in shown[:_SHOWN]],
        rows_of=reference.score.rows_of,
    )


def sentences(result: DriftResult) -> list[str]:
    """The result in words."""
    judged = [one for one in result.fields if one.verdict != "not judged"]
    drifted = [one.name for one in judged if one.verdict == "drifted"]
    score = "The score has drifted" if result.score.verdict == "drifted" else "The score has not drifted"
    said = f": {', '.join(drifted)}" if drifted else ""
    found = [
        f"{score} (PSI {number(result.score.shift.psi, 3)}).",
        f"{len(drifted) or 'None'} of {len(judged)} fields {'has' if len(drifted) < 2 else 'have'} drifted{said}.",
    ]
    waiting = [one.name for one in result.fields if one.verdict == "not judged"]
    return [*found, *([f"Not judged: {', '.join(waiting)}."] if waiting else [])]


def share(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.2f} %"


def shift_picture(fields: list[Drifted], threshold: float) -> str:
    """Stability index by field, what chance leaves of it lighter; the mark is where drift begins."""
    figure, (axes,), places = row_axes([one.name for one in fields], "Population stability index")
    most = max(one.shift.psi for one in fields)
    axes.set_xlim(0, max(1.5 * threshold, 1.05 * most))
    for y, one in zip(places, fields, strict=True):
        colour = _ALARM if one.verdict == "drifted" else _STILL if one.verdict == "stable" else _BEFORE
        axes.barh([y], [one.shift.psi], 10, color=colour)
        axes.barh([y], [min(one.shift.psi, one.shift.chance)], 10, color="white", alpha=0.6)
        axes.plot([one.shift.chance + threshold] * 2, [y - 8, y + 8], color=DIM, linewidth=1.2)
    return svg(figure)


def shares_picture(one: Drifted, names: list[str], in_order: bool = False) -> str:
    """Shares of values in training and now: all in order, or those that have changed the most."""
    chosen = list(range(len(names))) if in_order else _changed(one)
    figure, (axes,), places = row_axes([names[group] for group in chosen], "Share, %")
    before_G, now_G = 100 * one.shares_2G[:, chosen]
    drawn: dict[str, Artist] = {}
    for label, value_G, offset, colour in (("before", before_G, -3.5, _BEFORE), ("now", now_G, 3.5, _STILL)):
        drawn[label] = axes.barh([y + offset for y in places], value_G, 6, color=colour).patches[0]
    legend(figure, drawn)
    return svg(figure)


def _changed(one: Drifted) -> list[int]:
    """The groups whose shares have changed the most, in their order; those with no rows at all are left out."""
    before_G, now_G = one.shares_2G
    order = np.argsort(-np.abs(now_G - before_G), kind="stable")
    return sorted(int(group) for group in order[:_GROUPS] if before_G[group] + now_G[group] > 0)


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
