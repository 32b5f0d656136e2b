"""What a command does that is more than one call; shared by the command line and the demo."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from features.dataset import PreparedDataset
from features.errors import InputError
from serving.bundle import Bundle, load_bundle
from serving.models import locate
from training.baselines import baseline_scores, sample_notes
from training.evaluation.evaluate import (
    MODEL,
    Evaluation,
    Rows,
    Subject,
    evaluate,
    rows_of_dataset,
    rows_of_files,
    same_rows_of_files,
)
from training.evaluation.examine import Seen, examine
from training.evaluation.files import intervals, write_files
from training.evaluation.intervals import REPLICATES
from training.evaluation.slices import worse
from training.progress import stages
from training.tracking.opening import attach_report


@dataclass(frozen=True)
class _Opened:
    """A model that was asked for, the name by which it was, and its version; outside a registry part of its digest."""

    name: str
    bundle: Bundle
    version: str


def run_evaluate(
    model: str,
    data: Path | None,
    sources: list[str],
    split: str,
    out: Path | None,
    max_bad_rows: float,
    *,
    against: str | None = None,
    replicates: int = REPLICATES,
    html: bool = True,
    console: Console | None = None,
) -> tuple[dict[str, Any], Evaluation]:
    """`masknet evaluate`: returns the result that --json prints, and the evaluation behind it.

    Args:
        model: any name of a bundle; so is `against`, the rival on the same rows.
        data: prepared rows, of which `split` counts; or raw `sources`, of which `max_bad_rows` may be set aside.
        out: folder of the files; by default runs/evaluations/NAME-VERSION-SPLIT, with a rival and -against-DIGEST.
        replicates: bootstrap draws for the intervals.
        html: whether to write the report for people too.
        console: where progress is shown, if it is a terminal; by default standard error.

    Raises:
        InputError: a model, the data or their match is wrong; the message names which.
    """
    if (data is None) == (not sources):
        raise InputError("give either --data or --input")
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is no folder")
    started = time.perf_counter()
    first, second = _open(model, against)
    if data is not None:
        evaluation, seen = _of_dataset(first, second, PreparedDataset.open(data), split)
    else:
        evaluation, seen = _of_files(first, second, sources, max_bad_rows)
    with stages(console or Console(stderr=True)) as progress:
        evaluation = examine(evaluation, seen, replicates=replicates, progress=progress)
    place = seen.split if second is None else f"{seen.split}-against-{second.bundle.digest[:12]}"
    out = out or Path("runs") / "evaluations" / f"{first.bundle.name}-{first.version}-{place}"
    files = write_files(evaluation, out, html)
    attach_report(first.bundle.manifest["run_id"], files, place)
    return {**_answer(evaluation), "report": str(files[0]), "seconds": time.perf_counter() - started}, evaluation


def _answer(evaluation: Evaluation) -> dict[str, Any]:
    findings = evaluation.findings
    assert findings is not None  # it has just been examined
    models = [subject.name for subject in evaluation.subjects]
    found = {
        "metrics": evaluation.metrics[evaluation.model],
        "intervals": intervals(findings)[evaluation.model],
        "baselines": {name: found for name, found in evaluation.metrics.items() if name not in models},
        "by_familiarity": evaluation.by_familiarity,
    }
    if evaluation.rival is None:
        return found
    comparison = next(one for one in findings.comparisons if one.second == evaluation.rival)
    return found | {
        "against": evaluation.metrics[evaluation.rival],
        "comparison": {
            "sentence": comparison.sentence,
            "verdicts": {metric: one.verdict for metric, one in comparison.differences.items()},
            "worse_slices": [one.name for one in worse(findings.slices)],
        },
    }


def _open(model: str, against: str | None) -> tuple[_Opened, _Opened | None]:
    """The model and its rival; InputError where they are the same."""
    located = locate(model)
    bundle = load_bundle(located.path)
    version = bundle.version(located.version)
    if against is None:
        return _Opened(MODEL, bundle, version), None
    other = locate(against)
    rival = load_bundle(other.path)
    if rival.digest == bundle.digest:
        raise InputError(f"--against {against}: this is the model {model} itself")
    opened = _Opened(_short(other.uri), rival, rival.version(other.version))
    return _Opened(_short(located.uri), bundle, version), opened


def _short(uri: str) -> str:
    return uri.removeprefix("models:/")


def _of_dataset(
    first: _Opened, second: _Opened | None, dataset: PreparedDataset, split: str
) -> tuple[Evaluation, Seen]:
    """On prepared rows, beside baselines where the data set has the splits that these are fitted on."""
    rows = rows_of_dataset(first.bundle, dataset, split)
    if second is not None:
        dataset.require_pipeline(second.bundle.pipeline.digest, f"--against {second.name}")
    fitted = {"train", "valid"} <= set(dataset.splits)
    baselines = baseline_scores(dataset, split) if fitted else {}
    train = dataset.files("train") if "train" in dataset.splits else None
    evaluation = _evaluated(first, second, rows, rows, baselines)
    if fitted and train is not None:
        evaluation = replace(evaluation, notes=sample_notes(train))
    return evaluation, Seen(train, split, rows.known)


def _of_files(
    first: _Opened, second: _Opened | None, sources: list[str], max_bad_rows: float
) -> tuple[Evaluation, Seen]:
    """On raw rows, which tell nothing of training."""
    if second is None:
        rows = others = rows_of_files(first.bundle, sources, max_bad_rows)
    else:
        rows, others = same_rows_of_files(first.bundle, second.bundle, sources, max_bad_rows)
    return _evaluated(first, second, rows, others, {}), Seen(None, "input", rows.known)


def _evaluated(
    first: _Opened, second: _Opened | None, rows: Rows, others: Rows, baselines: dict[str, Any]
) -> Evaluation:
    rival = None if second is None else Subject(second.name, second.bundle, others.table)
    return evaluate(first.bundle, rows, baselines, name=first.name, rival=rival)
