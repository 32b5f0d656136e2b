"""Parts of the reports' pictures, which are SVG text that stands inside the page."""

import io
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0b6e99", "#d9730d", "#5f6670", "#6940a5")
STYLES = ("-", "--", ":", "-.")  # what colour says, a line's style says too: print may be black and white
INK, DIM, GRID = "#1f2328", "#59636e", "#e6e9ec"
TEXT = 9.5  # points: 11 pixels on a telephone, which shows the 4.2 inches of a picture at 358
WIDTH = 4.2  # inches
_LINE, _GAP, _FRAME = 12, 7, 46  # points: a line of a name, what is between rows, axis and its label
_NAME = 22  # characters in a line of a name
_LEGEND = 36  # characters of a name in a legend


def plain_axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """Axes of which only the left and the lower line are drawn."""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label, fontsize=TEXT, color=DIM)
    axes.set_ylabel(y_label, fontsize=TEXT, color=DIM)
    _plain(axes)
    return figure, axes


def row_axes(names: Sequence[str], x_label: str, panels: int = 1) -> tuple[Figure, list[Axes], list[float]]:
    """Panels beside each other with a row for each name, and the rows' places on the y axis, in points."""
    height, places, wrapped = 0.0, [], []
    for name in names:
        lines = textwrap.wrap(name, _NAME) or [""]
        row = _LINE * len(lines) + _GAP
        places.append(height + row / 2)
        wrapped.append("\n".join(lines))
        height += row
    figure = Figure(figsize=(WIDTH, (height + _FRAME) / 72), layout="constrained")
    found = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for axes in found:
        axes.set_ylim(height, 0)
        axes.set_xlabel("\n".join(textwrap.wrap(x_label, 2 * _NAME)), fontsize=TEXT, color=DIM, parse_math=False)
        _plain(axes)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, pad=6)
    found[0].set_yticks(places, wrapped, parse_math=False)
    return figure, list(found), places


def legend(figure: Figure, drawn: Mapping[str, Artist]) -> None:
    """Names of what is drawn, above the axes; as users' text, in which no $ begins a formula and no _ hides a name."""
    names = [name if len(name) <= _LEGEND else f"…{name[1 - _LEGEND :]}" for name in drawn]  # paths differ at their end
    found = figure.legend(list(drawn.values()), names, loc="outside upper left", frameon=False, fontsize=TEXT)
    for text in found.get_texts():
        text.set_parse_math(False)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b6bcc3")
    axes.tick_params(labelsize=TEXT, color="#b6bcc3", labelcolor=INK)


def svg(figure: Figure) -> str:
    """A figure as an SVG element."""
    text = io.StringIO()
    # Text stays text, so that it is sharp and can be selected; a fixed salt, so that equal data gives equal bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "masknet", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
