"""What a command does that is more than one call; shared by the command line and the demo."""

import time
from pathlib import Path
from typing import Any

from features.dataset import PreparedDataset
from features.errors import InputError
from serving.bundle import load_bundle
from serving.models import locate
from training.baselines import baseline_scores
from training.evaluate import MODEL, Evaluation, evaluate, rows_of_dataset, rows_of_files, write_report
from training.tracking.opening import attach_report


def run_evaluate(
    model: str, data: Path | None, sources: list[str], split: str, out: Path | None, max_bad_rows: float
) -> tuple[dict[str, Any], Evaluation]:
    """`masknet evaluate`: returns the result that --json prints, and the evaluation behind it."""
    if (data is None) == (not sources):
        raise InputError("give either --data or --input")
    started = time.perf_counter()
    bundle = load_bundle(locate(model).path)
    if data is not None:
        dataset = PreparedDataset.open(data)
        rows = rows_of_dataset(bundle, dataset, split)
        evaluation = evaluate(bundle, rows, baseline_scores(dataset, split))
    else:
        split = "input"
        evaluation = evaluate(bundle, rows_of_files(bundle, sources, max_bad_rows), {})
    out = out or Path("runs") / "evaluations" / f"{bundle.name}-{split}"
    report = write_report(evaluation, out)
    attach_report(bundle.manifest["run_id"], out, split)
    result = {
        "metrics": evaluation.metrics[MODEL],
        "baselines": {name: found for name, found in evaluation.metrics.items() if name != MODEL},
        "by_familiarity": evaluation.by_familiarity,
        "report": str(report),
        "seconds": time.perf_counter() - started,
    }
    return result, evaluation
