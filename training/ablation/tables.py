"""An ablation's answer as a table for a terminal."""

from typing import Any

from rich.table import Table

from training.report import number


def cells_table(found: dict[str, Any]) -> Table:
    """A row per cell: metrics with half their 95 % intervals, and differences to the baseline that tests have looked
    at."""
    data = found["data"]
    title = f"{found['study']}: {data['test_rows']:,} test rows, {found['seeds']} seeds, against {found['baseline']}"
    table = Table(title=title, title_justify="left")
    table.add_column("cell")
    for name in ("AUC ±95 %", "log loss ±95 %", "NE", "ECE", "Δ AUC", "p", "Δ log loss", "p", "step ×", "serve ×"):
        table.add_column(name, justify="right")
    for cell in found["cells"]:
        if not cell["seeds_done"]:
            table.add_row(cell["cell"], str(cell["trouble"]), *[""] * 9)
            continue
        metrics, differences = cell["metrics"], cell["differences"]
        row = [with_margin(metrics["auc"]), with_margin(metrics["logloss"])]
        row += [number(mean_of(metrics[name])) for name in ("ne", "ece")]
        for name in ("auc", "logloss"):
            row += [signed(differences[name]), p_value(differences[name])]
        row += [ratio(cell["step"]), ratio(cell["forward"])]
        name = cell["cell"] + ("" if cell["trouble"] is None else " (!)")
        table.add_row(name, *row)
    for cell in found["cells"]:
        if cell["trouble"] is not None and cell["seeds_done"]:
            table.caption = f"{table.caption or ''}(!) {cell['cell']}: {cell['trouble']}\n"
    return table


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
    """A time over the baseline's."""
    return "–" if timed is None else f"{timed['ratio']['p50']:.2f}"
