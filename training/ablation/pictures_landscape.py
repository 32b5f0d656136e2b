"""The picture of loss surfaces side by side, as SVG text."""

import textwrap
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from training.ablation.landscape import FloatKK, Surface
from training.pictures import svg

COLUMNS = 2  # more do not read on a phone
LEVELS = 13
_COLOURS = "cividis"  # reads alike with and without colour blindness
_NO_LOSS = "#dadce0"
_TITLE = 26  # characters in a line of a panel's title
_SMALL, _SMALLER = 9, 8  # points, at the width of the report's other pictures


def landscape_picture(surfaces: Mapping[str, Surface]) -> str:
    """A contour panel per cell, all with the same levels of the loss above the panel's own lowest; grey is not finite.

    Levels are log-spaced. What lies below the first has the first's colour.
    """
    above = {name: _above_lowest(surface.loss_KK) for name, surface in surfaces.items()}
    level_L = _levels(list(above.values()))
    columns = min(COLUMNS, len(surfaces))
    rows = -(-len(surfaces) // columns)
    figure = Figure(figsize=(4.6, 0.9 + 4.4 / columns * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    colours = ScalarMappable(BoundaryNorm(level_L, 256), _COLOURS)
    for place, (axes, (name, surface)) in enumerate(zip(grid, surfaces.items(), strict=False)):
        axes.set_title("\n".join(textwrap.wrap(name, _TITLE)), fontsize=_SMALL, parse_math=False)
        axes.set_aspect("equal")
        axes.set_facecolor(_NO_LOSS)
        axes.tick_params(labelsize=_SMALLER, labelbottom=place >= len(surfaces) - columns)
        axes.locator_params(nbins=5)
        if np.isfinite(surface.loss_KK).any():
            shown_KK = np.clip(above[name], level_L[0], level_L[-1])
            axes.contourf(surface.axis_K, surface.axis_K, shown_KK, level_L, norm=colours.norm, cmap=_COLOURS).set(
                edgecolor="white", linewidth=0.3
            )
        axes.plot(0, 0, marker="P", markersize=6, color="white", markeredgecolor="black", markeredgewidth=0.8)
    for axes in grid[len(surfaces) :]:
        axes.set_visible(False)
    figure.supxlabel("First direction, in norms of the weights", fontsize=_SMALL)
    figure.supylabel("Second direction", fontsize=_SMALL)
    bar = figure.colorbar(colours, ax=grid, location="top", ticks=level_L[::3], format="%.2g", aspect=40)
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=_SMALLER)
    bar.set_label("Loss above the panel's lowest", fontsize=_SMALL)
    return svg(figure)


def _above_lowest(loss_KK: FloatKK) -> FloatKK:
    return loss_KK - np.min(loss_KK, where=np.isfinite(loss_KK), initial=np.inf)


def _levels(above: list[FloatKK]) -> npt.NDArray[np.float64]:
    """Levels [L] from what the flattest panel's lowest places have to what the steepest panel's highest has."""
    rising = [above_KK[above_KK > 0] for above_KK in above if (above_KK > 0).any()]
    high = max((float(values.max()) for values in rising), default=1.0)
    low = min((float(np.quantile(values, 0.02)) for values in rising), default=1.0)
    return np.geomspace(min(low, high / 10), high, LEVELS)
