"""An ablation's answer as tables for a terminal, and the forms that its numbers have everywhere."""

from typing import Any

from rich.table import Table

from training.numbers import number

FAMILIES = {
    "normalization": "Normalizations",
    "placement": "Placements in residual blocks",
    "without": "Without a part",
    "model.blocks": "Number of blocks",
    "model.embedding_dim": "Embedding width",
    "model.reduction_ratio": "Reduction ratio",
}


def metrics_table(found: dict[str, Any]) -> Table:
    """A row per cell: metrics with half their 95 % intervals."""
    title = f"{found['study']}: {found['data']['test_rows']:,} test rows, {found['seeds']} seeds, ± of 95 % intervals"
    table = _table(title, ("AUC", "log loss", "NE", "ECE"))
    for cell in found["cells"]:
        if not cell["seeds_done"]:
            table.add_row(cell["cell"], cell["trouble"].partition(":")[0])
            continue
        metrics = cell["metrics"]
        row = [with_margin(metrics["auc"]), with_margin(metrics["logloss"])]
        table.add_row(cell["cell"], *row, *(number(mean_of(metrics[name])) for name in ("ne", "ece")))
    troubles = [f"{cell['cell']}: {cell['trouble']}" for cell in found["cells"] if cell["trouble"] is not None]
    table.caption = "\n".join(troubles) or None
    return table


def differences_table(found: dict[str, Any]) -> Table:
    """A row per cell: differences to the baseline with corrected p, and times over the baseline's."""
    title = f"against {found['baseline']}: * told apart (p corrected); times of a training step and of serving"
    table = _table(title, ("Δ AUC", "p", "Δ log loss", "p", "step", "serve"))
    for cell in found["cells"]:
        if cell["seeds_done"]:
            row = [text for name in ("auc", "logloss") for text in _tested(cell["differences"][name])]
            table.add_row(cell["cell"], *row, ratio(cell["step"]), ratio(cell["forward"]))
    return table


def _table(title: str, heads: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("cell", overflow="fold", min_width=13)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _tested(difference: dict[str, Any] | None) -> tuple[str, str]:
    return signed(difference), p_value(difference)


def mean_of(estimate: dict[str, Any] | None) -> float | None:
    """An estimate's mean."""
    return None if estimate is None else float(estimate["mean"])


def with_margin(estimate: dict[str, Any] | None) -> str:
    """Mean ± half of the 95 % interval."""
    if estimate is None:
        return "–"
    return f"{estimate['mean']:.4f} ±{(estimate['high'] - estimate['low']) / 2:.4f}"


def signed(difference: dict[str, Any] | None) -> str:
    """A difference, with an asterisk where it is told apart from 0 after correction."""
    if difference is None:
        return "–"
    star = "" if difference["verdict"] == "not told apart" else " *"
    return f"{difference['mean']:+.4f}{star}"


def p_value(difference: dict[str, Any] | None) -> str:
    """The corrected p."""
    if difference is None:
        return "–"
    p = difference["p_holm"]
    return "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def ratio(timed: dict[str, Any] | None) -> str:
    """A time over the baseline's, the median over turns."""
    return "–" if timed is None else f"{timed['ratio']['p50']:.2f}"


def ratio_range(timed: dict[str, Any] | None) -> str:
    """The same with the 20th and the 80th percentile."""
    return "–" if timed is None else "{p50:.2f} ({p20:.2f}–{p80:.2f})".format(**timed["ratio"])
