"""Results as tables for a terminal."""

from typing import Any

from rich.table import Table

from training.evaluate import Evaluation
from training.report import number

_METRICS = {
    "auc": "AUC",
    "logloss": "log loss",
    "ne": "normalized entropy",
    "calibration": "calibration",
    "ece": "ECE",
    "gauc": "grouped AUC",
}


def metrics_table(evaluation: Evaluation) -> Table:
    """A row per metric, a column per scorer, the model first."""
    table = Table(title=f"{evaluation.bundle.name}, {evaluation.source}", title_justify="left")
    table.add_column("metric")
    for scorer in evaluation.metrics:
        table.add_column(scorer, justify="right")
    for name, title in _METRICS.items():
        table.add_row(title, *(number(found[name]) for found in evaluation.metrics.values()))
    for part, facts in evaluation.by_familiarity.items():
        table.add_row(f"AUC, {part} ({facts['rows']:,} rows)", *(number(value) for value in facts["auc"].values()))
    return table


def profile_table(profile: dict[str, Any]) -> Table:
    """Fields of a prepared data set: size of their tables, distinct values, and shares per split."""
    splits = list(profile["splits"])
    table = Table(title=f"prepared fields; distinct values and shares in {', '.join(splits)}", title_justify="left")
    for name in ("field", "type", "encoder"):
        table.add_column(name)
    for name in ("ids", "distinct", "missing", "unknown", "PSI", "AUC alone"):
        table.add_column(name, justify="right")
    for name, field in profile["fields"].items():
        distinct = " ".join(f"{field[split]['distinct']:,}" for split in splits)
        shares = [" ".join(_share(field[split], kind) for split in splits) for kind in ("missing", "unknown")]
        ids = "value" if field["ids"] is None else f"{field['ids']:,}"
        alone = [number(field[kind]) for kind in ("psi", "auc")]
        table.add_row(name, field["type"], field["encoder"], ids, distinct, *shares, *alone)
    return table


def _share(facts: dict[str, Any], kind: str) -> str:
    return f"{100 * facts[kind] / facts['values']:.1f}%" if facts["values"] else "–"
