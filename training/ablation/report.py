"""The report of an ablation: one HTML file that needs nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import yaml

from training.ablation.jobs import DIAGNOSED_ROWS
from training.ablation.landscape import Surface
from training.ablation.measure import TURNS
from training.ablation.pictures import by_seed, forest_picture, seeds_picture
from training.ablation.pictures_landscape import landscape_picture
from training.ablation.study import MOST_BEYOND, TUNING_SEED
from training.ablation.tables import FAMILIES, mean_of, p_value, with_margin
from training.ablation.verdict import cautions, detectable, verdict
from training.numbers import number

if TYPE_CHECKING:
    from training.ablation.results import Answer

Cell = dict[str, Any]

_COMPARED = {"auc": ("AUC", -1), "logloss": ("log loss", 1)}  # and the sign that sorts better cells first
_CURVATURE = {
    "largest": "Largest eigenvalue",
    "trace": "Trace",
    "largest_normalized": "Largest, relative to filters",
    "trace_normalized": "Trace, relative to filters",
}


@dataclass(frozen=True)
class Fact:
    """What a diagnostic is called and says, and whether its shades go by magnitude."""

    key: str
    title: str
    meaning: str
    magnitudes: bool = False


FACTS = (
    Fact(
        "output_variance",
        "Output variance",
        "Over rows and channels. What a norm holds steady may shrink or grow without it.",
        magnitudes=True,
    ),
    Fact("dead", "Dead channels", "Share of channels that are the same for all rows and so say nothing."),
    Fact(
        "gradient_norm",
        "Gradient norm",
        "Of the loss by the block's weights, after training. Blocks of very unlike norms learn at unlike speeds.",
        magnitudes=True,
    ),
    Fact(
        "saturation",
        "Saturated tanh",
        "Share of a tanh norm's arguments beyond ±2, where under 7 % of the slope is left.",
    ),
    Fact("gate_mean", "Mean gate", "Of the instance-guided mask: what it multiplies by on average."),
    Fact(
        "gate_deviation",
        "Gate between rows",
        "Standard deviation of a gate over rows, mean over gates. At 0 the mask guides by no instance.",
    ),
    Fact("gate_negative", "Negative gates", "Share of gates below 0, which turn the sign of what they mask."),
    Fact(
        "angle",
        "Angle to the block before",
        "Between the two outputs of a row, over π: 0 is the same direction, 0.5 a right angle.",
    ),
    Fact(
        "auc_drop",
        "AUC lost without the block",
        "It then gives 0 (parallel) or its input (serial). Below 0, the network is better without it.",
    ),
)


def render(found: Answer) -> str:
    """The report's HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": number, "margin": with_margin, "p": p_value, "mean": mean_of, "short": short}
    environment.globals |= {"shade": shade, "words": words, "told": told, "by_seed": by_seed}
    base = next(cell for cell in found["cells"] if cell["cell"] == found["baseline"])
    landscapes = {cell["cell"]: cell["landscape"] for cell in found["cells"] if cell["landscape"]}
    return environment.get_template("ablation.html").render(
        found=found,
        base=base,
        verdict=verdict(found),
        cautions=cautions(found),
        families=_families(found, "auc"),
        forests={_COMPARED[metric][0]: forest(found, metric) for metric in _COMPARED},
        seeds=_seeds(found, base),
        rates=sorted({float(rate) for cell in found["cells"] for rate in cell["tried"]}),
        facts=[(fact, cells) for fact in FACTS if (cells := _with_fact(found, fact))],
        landscapes=landscapes,
        surfaces=surfaces(landscapes) if landscapes else None,
        curvature=_CURVATURE,
        configuration=yaml.safe_dump(found["config"], sort_keys=False),
        constants={
            "tuning_seed": TUNING_SEED,
            "most_beyond": MOST_BEYOND,
            "turns": TURNS,
            "diagnosed_rows": DIAGNOSED_ROWS,
        },
    )


def short(value: float | None) -> str:
    """Two significant digits, or a dash for what is not defined."""
    return "–" if value is None else f"{value:.2g}"


def shade(value: float, cells: list[Cell], fact: Fact) -> float:
    """How strongly to shade a diagnostic, 0 to 0.5, by its size or magnitude among all blocks of all cells."""
    sizes = [abs(block[fact.key]) for cell in cells for block in cell["blocks"] if block[fact.key]]
    if not sizes or value == 0:
        return 0.0
    low, high, size = min(sizes), max(sizes), abs(value)
    if fact.magnitudes:
        low, high, size = 0.0, math.log(high / low), math.log(size / low)
    return round(0.5 * size / high, 2) if high else 0.5


def _families(found: Answer, metric: str) -> dict[str, list[Cell]]:
    """Cells by their family's title, better ones first; those that cannot be compared stand at the end."""
    _, sign = _COMPARED[metric]

    def place(cell: Cell) -> float:
        difference = cell["differences"][metric]
        if cell["cell"] == found["baseline"]:
            return -math.inf
        return math.inf if difference is None else sign * difference["mean"]

    families: dict[str, list[Cell]] = {}
    for cell in found["cells"]:
        families.setdefault(FAMILIES.get(cell["family"], cell["family"]), []).append(cell)
    return {title: sorted(cells, key=place) for title, cells in families.items()}


def forest(found: Answer, metric: str) -> str | None:
    """The picture of differences in a metric, if there are any."""
    smallest = detectable(found, metric)
    if smallest is None:
        return None
    families = {
        title: others
        for title, cells in _families(found, metric).items()
        if (others := [cell for cell in cells if cell["cell"] != found["baseline"]])
    }
    label = f"Difference in {_COMPARED[metric][0]} to {found['baseline']}"
    return forest_picture(families, metric, label, smallest)


def _seeds(found: Answer, base: Cell) -> str | None:
    """The picture of every seed's AUC, if it is defined."""
    mean = mean_of(base["metrics"]["auc"])
    return None if mean is None else seeds_picture(_families(found, "auc"), "auc", "AUC on the test rows", mean)


def surfaces(landscapes: dict[str, Any]) -> str:
    """The picture of the loss around several cells' weights."""
    return landscape_picture(
        {
            name: Surface(np.array(found["axis"], dtype=np.float64), np.array(found["loss"], dtype=np.float64))
            for name, found in landscapes.items()
        }
    )


def _with_fact(found: Answer, fact: Fact) -> list[Cell]:
    """The cells that have a diagnostic in any block."""
    return [cell for cell in found["cells"] if any(block[fact.key] is not None for block in cell["blocks"])]


def told(cell: Cell) -> dict[str, str]:
    """The verdict of each metric that tells a cell apart from the baseline."""
    return {title: verdict for title, verdict in _verdicts(cell).items() if verdict in ("better", "worse")}


def words(cell: Cell) -> str:
    """What the metrics say of a cell, in the table's last column."""
    verdicts = _verdicts(cell)
    if len(set(verdicts.values())) > 1:
        return ", ".join(f"{title} {verdict}" for title, verdict in verdicts.items())
    return next(iter(verdicts.values()), "not compared")


def _verdicts(cell: Cell) -> dict[str, str]:
    differences = {title: cell["differences"][metric] for metric, (title, _) in _COMPARED.items()}
    return {title: difference["verdict"] for title, difference in differences.items() if difference is not None}
