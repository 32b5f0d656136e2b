"""An ablation's answer in sentences, for its report and its document."""

from statistics import median
from typing import Any

# What matched pairs in public grids show of MaskNet's layer norms, in AUC (BARS, github.com/openbenchmark/BARS).
PUBLIC_EFFECT = 5e-4
_TITLES = {"auc": "AUC", "logloss": "log loss"}

Found = dict[str, Any]


def verdict(found: Found) -> list[str]:
    """Which cells are told apart from the baseline, and the smallest difference that could have been."""
    sentences = []
    for metric, title in _TITLES.items():
        compared = [cell for cell in found["cells"] if cell["differences"][metric] is not None]
        if not compared:
            sentences.append(f"No cell could be compared with {found['baseline']} in {title}.")
            continue
        told = {word: [c["cell"] for c in compared if c["differences"][metric]["verdict"] == word] for word in _WORDS}
        parts = [f"{len(names)} {word} ({listed(names)})" for word, names in told.items() if names]
        rest = len(compared) - sum(map(len, told.values()))
        parts += [f"{rest} not told apart by this data"] if rest else []
        sentences.append(
            f"By {title}, of {len(compared)} cells compared with {found['baseline']}, {'; '.join(parts)}; typically, "
            f"a difference of {detectable(found, metric):.2g} would have been seen (80 % power, corrected)."
        )
    return sentences


_WORDS = ("better", "worse")


def cautions(found: Found) -> list[str]:
    """What a reader should hold against the numbers."""
    sentences = []
    smallest = detectable(found, "auc")
    if smallest is None or smallest > PUBLIC_EFFECT:
        sentences.append(
            "Public grids show effects of MaskNet's layer norms of 2e-4 to 5e-4 in AUC: this comparison cannot see "
            "those, and not told apart does not mean equal."
        )
    lonely = [cell["cell"] for cell in found["cells"] if any(_seeds(cell, metric) == 1 for metric in _TITLES)]
    if lonely:
        sentences.append(
            f"Compared by one seed only, so that what another seed would change is not known: {listed(lonely)}."
        )
    edge = [cell["cell"] for cell in found["cells"] if cell["lr_at_edge"]]
    if edge:
        sentences.append(f"At an end of the learning rates tried, so perhaps better beyond it: {listed(edge)}.")
    sentences += [f"{cell['cell']}: {cell['trouble']}." for cell in found["cells"] if cell["trouble"] is not None]
    return sentences


def _seeds(cell: dict[str, Any], metric: str) -> int | None:
    difference = cell["differences"][metric]
    return None if difference is None else difference["seeds"]


def detectable(found: Found, metric: str) -> float | None:
    """The median over cells of the smallest difference that each could have shown."""
    values = [c["differences"][metric]["detectable"] for c in found["cells"] if c["differences"][metric] is not None]
    return median(values) if values else None


def listed(names: list[str]) -> str:
    """Names with commas."""
    return ", ".join(names)
