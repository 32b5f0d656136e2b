"""The pictures of an evaluation, as SVG text; the report has a table of numbers behind each.

Legend: N rows, K bins, B blocks, F fields, P points of a curve.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm

from features.drift import DRIFT
from training.evaluation.curves import Histogram, Reliability
from training.evaluation.results import FieldImportance, MaskStatistics, Slice
from training.pictures import COLOURS, DIM, GRID, INK, STYLES, TEXT, legend, plain_axes, row_axes, svg

FloatN = npt.NDArray[np.floating]
VERDICTS = {"better": ("^", "#0b6e99"), "worse": ("v", "#b3470a"), "not told apart": ("o", "#59636e")}
SOME_PSI = 0.1  # by common usage stable below; between it and features.profile.DRIFT is some drift
_NEGATIVE, _NONE, _POSITIVE = "#d9730d", "#ffffff", "#0b6e99"
_CELLS = 240  # of a picture of masks: with more of them their numbers cannot be read


def roc_picture(curves: Mapping[str, tuple[FloatN, FloatN]]) -> str:
    """True against false positive rate, a line per scorer."""
    figure, axes = plain_axes("False positive rate", "True positive rate")
    drawn: dict[str, Artist] = {}
    for index, (name, (false_rate, true_rate)) in enumerate(curves.items()):
        (drawn[name],) = axes.plot(false_rate, true_rate, STYLES[index % 4], color=COLOURS[index % 4], linewidth=1.8)
    legend(figure, drawn)
    return svg(figure)


def reliability_picture(found: Mapping[str, Reliability]) -> str:
    """Observed click rate against predicted, a dot per bin of equally many rows; on the diagonal is right."""
    figure, axes = plain_axes("Predicted click rate", "Observed click rate")
    most = max(float(max(curve.predicted.max(), curve.observed.max())) for curve in found.values())
    axes.plot([0, most], [0, most], color="#c4c7c5", linewidth=1)
    drawn: dict[str, Artist] = {}
    for index, (name, curve) in enumerate(found.items()):
        style, colour = f"o{STYLES[index % 4]}", COLOURS[index % 4]
        (drawn[name],) = axes.plot(curve.predicted, curve.observed, style, markersize=4, color=colour, linewidth=1.2)
    legend(figure, drawn)
    return svg(figure)


def histogram_picture(found: Histogram) -> str:
    """How many rows got which score, clicks stacked on the others."""
    figure, axes = plain_axes("Score", "Rows")
    width = np.diff(found.edges)
    drawn: dict[str, Artist] = {
        "no click": axes.bar(found.edges[:-1], found.others, width, align="edge", color="#b6bcc3").patches[0],
        "click": axes.bar(found.edges[:-1], found.clicks, width, found.others, align="edge", color=COLOURS[0]).patches[
            0
        ],
    }
    axes.yaxis.set_major_formatter("{x:,.0f}")
    legend(figure, drawn)
    return svg(figure)


def importance_picture(found: Mapping[str, Sequence[FieldImportance]], label: str) -> str:
    """Log loss that shuffling a field costs, in the first model's order."""
    first, *_ = found.values()
    figure, (axes,), places = row_axes([one.field for one in first], label)
    height = 12 / len(found)
    drawn: dict[str, Artist] = {}
    for index, (name, fields) in enumerate(found.items()):
        by_name = {one.field: one for one in fields}
        bars = [(y, by_name[one.field]) for y, one in zip(places, first, strict=True) if one.field in by_name]
        drawn[name] = axes.barh(
            [y + height * (index - (len(found) - 1) / 2) for y, _ in bars],
            [one.logloss_rise for _, one in bars],
            height,
            xerr=[one.logloss_rise_sd for _, one in bars],
            color=COLOURS[index % 4],
            error_kw={"ecolor": INK, "elinewidth": 0.9},
        ).patches[0]
    _zero(axes)
    if len(found) > 1:
        legend(figure, drawn)
    return svg(figure)


def mask_picture(masks: MaskStatistics) -> str:
    """Mean gate and its deviation between rows, a row per field and a column per block."""
    figure, panels, places = row_axes(masks.fields, "Block", panels=2)
    edges = [0.0, *np.add(places[:-1], places[1:]) / 2, panels[0].get_ylim()[0]]
    reach = float(max(np.abs(masks.mean_BF).max(), masks.deviation_BF.max())) or 1.0
    digits = 2 if reach >= 0.1 else 3
    shade = LinearSegmentedColormap.from_list("signed", [_NEGATIVE, _NONE, _POSITIVE])
    for axes, value_BF, title in zip(
        panels, (masks.mean_BF, masks.deviation_BF), ("Mean gate", "Deviation"), strict=True
    ):
        norm: Normalize = TwoSlopeNorm(0.0, -reach, reach)
        blocks = len(value_BF)
        axes.pcolormesh(np.arange(blocks + 1) + 0.5, edges, value_BF.T, cmap=shade, norm=norm, edgecolors="white")
        axes.set_title(title, fontsize=TEXT, color=INK)
        axes.set_xticks(range(1, blocks + 1))
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="x", length=0)
        if value_BF.size <= _CELLS:
            for block in range(blocks):
                for y, value in zip(places, value_BF[block], strict=True):
                    dark = abs(value) > 0.6 * reach
                    colour = "white" if dark else INK
                    axes.text(block + 1, y, f"{value:.{digits}f}", fontsize=7.5, ha="center", va="center", color=colour)
    return svg(figure)


def slices_picture(slices: Sequence[Slice], label: str) -> str:
    """Differences in log loss to the rival with their 95 % intervals, a row per slice; 0 is no difference."""
    figure, (axes,), places = row_axes([one.name for one in slices], label)
    _zero(axes)
    for y, one in zip(places, slices, strict=True):
        found = one.logloss
        assert found is not None  # what was not compared is not drawn
        assert found.value is not None
        assert found.low is not None
        assert found.high is not None
        marker, colour = VERDICTS[one.verdict or "not told apart"]
        filled = colour if one.verdict in ("better", "worse") else "white"
        axes.plot([found.low, found.high], [y, y], color=colour, linewidth=1.4)
        axes.plot([found.value], [y], marker, markersize=5.5, color=colour, markerfacecolor=filled)
    return svg(figure)


def drift_picture(psi: Mapping[str, float], label: str) -> str:
    """Population stability index by field; lines where it begins to matter and where it is large, 1 is the edge."""
    figure, (axes,), places = row_axes(list(psi), label)
    axes.set_xlim(0, min(1.0, max(0.3, *psi.values())))
    for y, value in zip(places, psi.values(), strict=True):
        colour = "#b3470a" if value > DRIFT else "#d9730d" if value > SOME_PSI else COLOURS[0]
        axes.barh([y], [value], 10, color=colour)
        if value > 1.0:
            axes.annotate(f"{value:.2f} ▸", (1.0, y), (-3, 0), textcoords="offset points", fontsize=8, color="white",
                          ha="right", va="center")  # fmt: skip
    for bound in (SOME_PSI, DRIFT):
        axes.axvline(bound, color=DIM, linewidth=0.9, linestyle=":")
    return svg(figure)


def _zero(axes: Axes) -> None:
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=5)
    axes.ticklabel_format(axis="x", style="plain", useOffset=False)
