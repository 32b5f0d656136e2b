"""The files of an evaluation: report.html for people, metrics.json and slices.csv for programs."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from features.errors import InputError
from features.files import file_written_whole, write_json
from training.evaluation.curves import Curves, curves_of
from training.evaluation.findings import Evaluation, Findings
from training.evaluation.report import render
from training.evaluation.results import Slice

SLICE_METRICS = ("auc", "logloss", "calibration")
REPORT, METRICS, SLICES = "report.html", "metrics.json", "slices.csv"


def write_files(evaluation: Evaluation, out: Path, html: bool = True) -> list[Path]:
    """Write the files of an examined evaluation into `out`; return their paths, the one to read first.

    Without `html`, a report.html that is there is removed: it would be of other numbers.

    Raises:
        InputError: `out` cannot be a folder.
    """
    findings = evaluation.findings
    assert findings is not None  # a report is of what was found
    curves = curves_of(evaluation)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}") from None
    with file_written_whole(out / SLICES) as aside:
        slices_table(evaluation, findings.slices).write_csv(aside)
    with file_written_whole(out / METRICS) as aside:
        write_json(aside, plain(evaluation, findings, curves))
    if not html:
        (out / REPORT).unlink(missing_ok=True)  # of another evaluation
        return [out / METRICS, out / SLICES]
    with file_written_whole(out / REPORT) as aside:
        aside.write_text(render(evaluation, findings, curves))
    return [out / REPORT, out / METRICS, out / SLICES]


def plain(evaluation: Evaluation, findings: Findings, curves: Curves) -> dict[str, Any]:
    """Everything that the report shows, as JSON holds it."""
    return {
        "model": evaluation.model,
        "against": evaluation.rival,
        "bundles": {subject.name: f"{subject.bundle.name} {subject.bundle.digest}" for subject in evaluation.subjects},
        "source": evaluation.source,
        "rows": evaluation.rows,
        "clicks": evaluation.clicks,
        "metrics": evaluation.metrics,
        "bounds": evaluation.bounds,
        "sampled": evaluation.sampled,
        "notes": list(evaluation.notes),
        "metrics_before_calibration": evaluation.metrics_before,
        "intervals": intervals(findings),
        "resampled": asdict(findings.resampled),
        "comparisons": [asdict(found) for found in findings.comparisons],
        "by_familiarity": evaluation.by_familiarity,
        "slices": [asdict(found) for found in findings.slices],
        "reliability": {name: _lists(asdict(found)) for name, found in curves.reliability.items()},
        "histogram": {name: _lists(asdict(found)) for name, found in curves.histogram.items()},
        "importance": {name: [asdict(one) for one in found] for name, found in findings.importance.items()},
        "masks": {name: _lists(asdict(found)) for name, found in findings.masks.items()},
        "drift": None if findings.drift is None else asdict(findings.drift),
        "cost": {name: [asdict(one) for one in found] for name, found in findings.cost.items()},
    }


def intervals(findings: Findings) -> dict[str, dict[str, list[float | None]]]:
    """Lower and upper ends of the 95 % intervals, by scorer and metric."""
    return {
        name: {metric: [found.low, found.high] for metric, found in estimates.items()}
        for name, estimates in findings.estimates.items()
    }


def slices_table(evaluation: Evaluation, slices: list[Slice]) -> pl.DataFrame:
    """A row per slice; with a rival also its metrics, and the difference in log loss."""
    types: dict[str, Any] = {"field": pl.String, "kind": pl.String, "name": pl.String, "rows": pl.Int64}
    types |= {"clicks": pl.Int64} | dict.fromkeys(SLICE_METRICS, pl.Float64)
    if evaluation.rival is not None:
        difference = [f"difference_{key}" for key in ("value", "low", "high", "p")]
        numbers = [*(f"against_{key}" for key in SLICE_METRICS), *difference, "p_corrected"]
        types |= dict.fromkeys(numbers, pl.Float64) | {"verdict": pl.String}
    rows = []
    for one in slices:
        row = {key: getattr(one, key) for key in ("field", "kind", "name", "rows", "clicks")}
        row |= {key: one.metrics[evaluation.model][key] for key in SLICE_METRICS}
        if evaluation.rival is not None:
            row |= {f"against_{key}": one.metrics[evaluation.rival][key] for key in SLICE_METRICS}
            row |= {f"difference_{key}": getattr(one.logloss, key, None) for key in ("value", "low", "high", "p")}
            row |= {"p_corrected": one.p_corrected, "verdict": one.verdict}
        rows.append(row)
    return pl.DataFrame(rows, schema=types)


def _lists(arrays: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in arrays.items()}
