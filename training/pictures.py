"""The report's pictures, as SVG text that stands inside the page."""

import io
from collections.abc import Mapping

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from features.metrics import reliability

FloatN = npt.NDArray[np.floating]
_COLOURS = ("#0b6e99", "#9aa0a6", "#d9730d", "#6940a5")


def roc_picture(label_N: FloatN, scores: Mapping[str, FloatN]) -> str:
    """True against false positive rate, a line per scorer."""
    figure, axes = _axes("False positive rate", "True positive rate")
    for (name, score_N), colour in zip(scores.items(), _COLOURS, strict=False):
        false_rate, true_rate, _ = roc_curve(label_N, score_N)
        axes.plot(false_rate, true_rate, label=name, color=colour, linewidth=1.8)
    axes.legend(frameon=False, loc="lower right")
    return svg(figure)


def calibration_picture(label_N: FloatN, scores: Mapping[str, FloatN]) -> str:
    """Observed click rate against predicted, a dot per bin of equally many rows; on the diagonal is right."""
    figure, axes = _axes("Predicted click rate", "Observed click rate")
    axes.plot([0, 1], [0, 1], color="#c4c7c5", linewidth=1, linestyle="--")
    for (name, score_N), colour in zip(scores.items(), _COLOURS, strict=False):
        predicted, observed, _ = reliability(label_N, score_N)
        axes.plot(predicted, observed, marker="o", markersize=4, label=name, color=colour, linewidth=1.2)
    axes.legend(frameon=False, loc="lower right")
    return svg(figure)


def histogram_picture(label_N: FloatN, score_N: FloatN) -> str:
    """How many rows got which score, clicks and non-clicks apart."""
    figure, axes = _axes("Score", "Rows")
    bins = np.linspace(0.0, 1.0, 41)
    parts = [score_N[label_N == 0], score_N[label_N == 1]]
    axes.hist(parts, bins=list(bins), stacked=True, label=["no click", "click"], color=[_COLOURS[1], _COLOURS[0]])
    axes.legend(frameon=False)
    return svg(figure)


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg(figure: Figure) -> str:
    """A figure as an SVG element."""
    text = io.StringIO()
    # Text stays text, so that it is sharp and can be selected; a fixed salt, so that equal data gives equal bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "masknet", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
