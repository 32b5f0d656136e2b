"""Results as tables for a terminal."""

from typing import Any

from rich.table import Table
from rich.text import Text

from training.evaluation.findings import Evaluation
from training.evaluation.wording import titles, with_interval
from training.numbers import number


def metrics_table(evaluation: Evaluation) -> Table:
    """A row per metric: the model with 95 % intervals and the baselines; or two models and their difference."""
    findings, rival = evaluation.findings, evaluation.rival
    name = evaluation.bundle.name if rival is None else f"{evaluation.model} against {rival}"
    table = Table(title=Text(f"{name}, {evaluation.source}"), title_justify="left")
    shown = list(evaluation.metrics) if rival is None else [evaluation.model, rival]
    table.add_column("metric", no_wrap=True)
    for place, title in enumerate(shown if rival is None else ["model", "against"]):
        table.add_column(Text(title), justify="right", no_wrap=place == 0)
    if rival is not None:
        table.add_column("difference", justify="right", no_wrap=True)
        table.add_column("told apart")
    for key, title in titles(evaluation).items():
        cells = [number(evaluation.metrics[scorer][key]) for scorer in shown]
        if findings is not None and rival is None:
            cells[0] = with_interval(findings.estimates[evaluation.model][key])
        elif findings is not None and key in findings.comparisons[0].differences:  # the first is that with the rival
            difference = findings.comparisons[0].differences[key]
            cells += [with_interval(difference), "–" if difference.verdict == "not told apart" else difference.verdict]
        table.add_row(title, *cells)
    for part, facts in evaluation.by_familiarity.items():
        table.add_row(Text(f"AUC, {part}"), *(number(facts["auc"][scorer]) for scorer in shown))
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
