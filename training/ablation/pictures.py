"""The pictures of an ablation's cells, as SVG text: differences to the baseline, and what each seed gave."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean, median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.pictures import svg

Families = Mapping[str, Sequence[dict[str, Any]]]  # cells of an answer by the family's title

_MARKS = {"better": ("^", "#0b6e99"), "worse": ("v", "#b3470a"), "not told apart": ("o", "#59636e")}
_BAND, _HEADING = "#dceaf1", "#f0f2f4"
_INK, _DIM = "#1f2328", "#59636e"
_SIZE = 8.5  # points of text: more on a screen, which shows the 4.6 inches of a picture at 358 pixels or more
_LINE, _GAP, _FRAME = 11, 6, 42  # points: a line of a name, what is between rows, axis and its label
_NAME = 22  # characters in a line of a name
_CLIPPED = 4.0  # times the median reach of the cells: what is farther out becomes an arrow and a number


def forest_picture(families: Families, metric: str, label: str, detectable: float) -> str:
    """Differences to the baseline with their 95 % intervals; ± detectable is shaded, and 0 is the baseline."""
    found = [cell["differences"][metric] for cells in families.values() for cell in cells]
    reaches = [max(abs(value["low"]), abs(value["high"])) for value in found if value is not None]
    limit = max(1.15 * detectable, _reach(reaches))
    with _rows(families, label) as (figure, axes, places):
        axes.set_xlim(-limit, limit)
        axes.axvspan(-detectable, detectable, color=_BAND, linewidth=0, zorder=-1)
        axes.axvline(0, color=_INK, linewidth=0.9)
        for y, cell in places:
            if cell["differences"][metric] is None:
                reason = "no finished seed" if not cell["seeds_done"] else "not comparable"
                _note(axes, y, -limit, -1, reason, _DIM)
            else:
                _interval(axes, y, cell["differences"][metric], limit)
    return svg(figure)


def seeds_picture(families: Families, metric: str, label: str, baseline: float) -> str:
    """A dot for each seed and a bar for their mean; the line is the baseline's mean."""
    values = {cell["cell"]: list(by_seed(cell, metric).values()) for cells in families.values() for cell in cells}
    limit = _reach([max(abs(value - baseline) for value in seeds) for seeds in values.values() if seeds])
    with _rows(families, label) as (figure, axes, places):
        axes.set_xlim(baseline - limit, baseline + limit)
        axes.axvline(baseline, color=_INK, linewidth=0.9, zorder=1)
        for y, cell in places:
            seeds = values[cell["cell"]]
            inside = [value for value in seeds if abs(value - baseline) <= limit]
            axes.plot(inside, [y] * len(inside), "o", markersize=4.5, color=_MARKS["better"][1], alpha=0.55)
            if seeds and abs(fmean(seeds) - baseline) <= limit:
                axes.plot(fmean(seeds), y, "|", markersize=10, color=_INK, markeredgewidth=1.6)
            for side in (-1, 1):
                beyond = [value for value in seeds if side * (value - baseline) > limit]
                if beyond:
                    text = f"{len(beyond)} of {len(seeds)}, to {max(beyond, key=lambda value: side * value):.4f}"
                    _arrow(axes, y, baseline + side * limit, side, text, _INK)
    return svg(figure)


def by_seed(cell: dict[str, Any], metric: str) -> dict[int, float]:
    """A cell's metric for each of its finished seeds; JSON has made the keys text."""
    estimate = cell["metrics"][metric]
    return {} if estimate is None else {int(seed): value for seed, value in estimate["by_seed"].items()}


def _reach(reaches: list[float]) -> float:
    """How far an axis goes to either side: a few cells far out shall not press all others together."""
    return 1.08 * min(max(reaches, default=0.0), _CLIPPED * median(reaches or [0.0])) or 1e-3


@contextmanager
def _rows(families: Families, label: str) -> Iterator[tuple[Figure, Axes, list[tuple[float, dict[str, Any]]]]]:
    """A row for each cell below its family's title, and where each is; heights are in points."""
    height, places, headings = 0.0, [], []
    names = []
    for title, cells in families.items():
        headings.append((height + (_LINE + _GAP) / 2, title))
        height += _LINE + _GAP
        for cell in cells:
            lines = textwrap.wrap(cell["cell"], _NAME) or [""]
            row = _LINE * len(lines) + _GAP
            places.append((height + row / 2, cell))
            names.append("\n".join(lines))
            height += row
    figure = Figure(figsize=(4.6, (height + _FRAME) / 72), layout="constrained")
    axes = figure.subplots()
    axes.set_ylim(height, 0)
    axes.set_yticks([y for y, _ in places], names, fontsize=_SIZE, parse_math=False)
    axes.tick_params(axis="y", length=0, pad=7)
    axes.tick_params(axis="x", labelsize=_SIZE)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#e6e9ec", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("\n".join(textwrap.wrap(label, 2 * _NAME)), fontsize=_SIZE, parse_math=False)
    for y, title in headings:
        axes.axhspan(y - _LINE / 2 - 1, y + _LINE / 2 + 1, color=_HEADING, linewidth=0, zorder=3)
        axes.annotate(
            title, (0, y), (3, 0), ("axes fraction", "data"), "offset points",
            fontsize=_SIZE, fontweight="bold", va="center", parse_math=False, zorder=4,
        )  # fmt: skip
    yield figure, axes, places
    axes.locator_params(axis="x", nbins=5)
    axes.ticklabel_format(axis="x", style="plain", useOffset=False)


def _interval(axes: Axes, y: float, difference: dict[str, Any], limit: float) -> None:
    marker, colour = _MARKS[difference["verdict"]]
    low, mean, high = (difference[key] for key in ("low", "mean", "high"))
    if abs(mean) > limit:
        side = 1 if mean > 0 else -1
        _arrow(axes, y, side * limit, side, f"{mean:+.4f}, {difference['verdict']}", colour)
        return
    axes.plot([max(low, -limit), min(high, limit)], [y, y], color=colour, linewidth=1.4)
    for side, end in ((-1, low), (1, high)):
        if abs(end) > limit:
            _arrow(axes, y, side * limit, side, "", colour)
    filled = "white" if difference["verdict"] == "not told apart" else colour
    axes.plot(mean, y, marker, markersize=5.5, color=colour, markerfacecolor=filled, markeredgewidth=1.3)


def _arrow(axes: Axes, y: float, x: float, side: int, text: str, colour: str) -> None:
    """An arrow out of the picture at its edge, and beside it what is there."""
    axes.plot(x, y, "<" if side < 0 else ">", markersize=4.5, color=colour, clip_on=False)
    _note(axes, y, x, side, text, colour)


def _note(axes: Axes, y: float, x: float, side: int, text: str, colour: str) -> None:
    """Text that begins or ends beside an edge."""
    axes.annotate(
        text, (x, y), (-8 * side, 0), textcoords="offset points",
        fontsize=_SIZE, color=colour, ha="left" if side < 0 else "right", va="center",
    )  # fmt: skip
