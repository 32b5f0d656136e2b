"""The answer of an ablation as plain data: what cells.json and cells.csv hold, and every table and picture is made
from."""

from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

import polars as pl

from features.dataset import PreparedDataset
from features.files import file_written_whole, write_json
from training.ablation.measure import Measured
from training.ablation.statistics import METRICS, CellStatistics
from training.ablation.study import FORMAT, Outcome, Study, facts_of_data

Answer = dict[str, Any]


def answer(
    study: Study,
    outcomes: list[Outcome],
    statistics: dict[str, CellStatistics],
    measured: Measured,
    dataset: PreparedDataset,
    device: dict[str, Any],
) -> Answer:
    """Everything that was found, cell by cell in the order asked for."""
    base = next(outcome for outcome in outcomes if outcome.cell.name == study.baseline)
    return {
        "format": FORMAT,
        "study": study.name,
        "baseline": study.baseline,
        "seeds": study.seeds,
        "trials": None if study.given_rates is not None else study.trials,
        "metrics": list(METRICS),
        "data": {"path": str(study.data), **facts_of_data(dataset)},
        "device": device,
        "training_seconds": sum(run["seconds"] for outcome in outcomes for run in outcome.runs.values()),
        "config": base.cell.config.model_dump(mode="json"),
        "cells": [_cell(outcome, statistics.get(outcome.cell.name), measured) for outcome in outcomes],
    }


def _cell(outcome: Outcome, found: CellStatistics | None, measured: Measured) -> dict[str, Any]:
    done = list(outcome.done.values())
    losses = dict(sorted(outcome.tried.items()))
    first = done[0] if done else {}
    return {
        "cell": outcome.cell.name,
        "family": outcome.cell.family,
        "lr": outcome.rate,
        "tried": {f"{rate:g}": loss for rate, loss in losses.items()},
        "lr_at_edge": len(losses) > 1 and outcome.rate in (min(losses), max(losses)),
        "seeds_done": list(outcome.done),
        "trouble": outcome.trouble,
        "metrics": {name: None if found is None else _plain(found.estimates.get(name)) for name in METRICS},
        "differences": {name: None if found is None else _plain(found.differences.get(name)) for name in METRICS},
        "epochs": fmean(run["best_epoch"] for run in done) if done else None,
        "samples_per_second": median(run["samples_per_second"] for run in done) if done else None,
        "parameters": first.get("parameters"),
        "step": measured.get(outcome.cell.name, {}).get("step"),
        "forward": measured.get(outcome.cell.name, {}).get("forward"),
        "blocks": _mean_diagnostics([run["diagnostics"] for run in done]),
        "landscape": next((run["landscape"] for run in done if "landscape" in run), None),
    }


def _plain(value: Any) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def _mean_diagnostics(runs: list[list[dict[str, float | None]]]) -> list[dict[str, float | None]]:
    """Facts of each block, averaged over seeds."""
    return [{key: _mean([run[key] for run in block]) for key in block[0]} for block in zip(*runs, strict=True)]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def write_answer(found: Answer, out: Path) -> None:
    """Write cells.json and cells.csv."""
    with file_written_whole(out / "cells.json") as aside:
        write_json(aside, found)
    with file_written_whole(out / "cells.csv") as aside:
        pl.DataFrame([_row(cell) for cell in found["cells"]], infer_schema_length=None).write_csv(aside)


def _row(cell: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"cell": cell["cell"], "family": cell["family"], "lr": cell["lr"]}
    row |= {"seeds": len(cell["seeds_done"]), "trouble": cell["trouble"]}
    for name in METRICS:
        estimate, difference = cell["metrics"][name] or {}, cell["differences"][name] or {}
        row |= {name: estimate.get("mean"), f"{name}_low": estimate.get("low"), f"{name}_high": estimate.get("high")}
        row |= {f"{name}_difference{end}": difference.get(key) for end, key in _ENDS.items()}
        row |= {f"{name}_{key}": difference.get(key) for key in ("se", "p", "p_holm", "detectable", "verdict")}
    row |= {key: cell[key] for key in ("epochs", "samples_per_second", "parameters")}
    for what in ("step", "forward"):
        timed = cell[what] or {}
        row |= {f"{what}_ms": timed.get("p50"), f"{what}_ratio": timed.get("ratio", {}).get("p50")}
    return row


_ENDS = {"": "mean", "_low": "low", "_high": "high"}
