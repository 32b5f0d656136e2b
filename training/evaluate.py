"""`masknet evaluate`: a model's metrics on labelled rows, beside baselines, and the report that shows them."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.dataset import LABEL, PreparedDataset, groups_of
from features.encoders import FIRST, Managed, Vocabulary
from features.errors import InputError
from features.files import file_written_whole, write_json
from features.id_maps import with_rows
from features.metrics import auc, score_metrics
from features.prepare import prepare
from serving.bundle import Bundle
from training.report import render

FloatN = npt.NDArray[np.floating]
MODEL = "MaskNet"


@dataclass(frozen=True)
class Rows:
    """Labelled rows in a model's encoding, and where they come from."""

    table: pa.Table
    source: str


@dataclass(frozen=True)
class Evaluation:
    """Scores of the same rows by the model and by each baseline, the model first."""

    bundle: Bundle
    source: str
    label_N: FloatN
    scores: dict[str, FloatN]
    metrics: dict[str, dict[str, float | None]]
    by_familiarity: dict[str, dict[str, Any]]


def rows_of_dataset(bundle: Bundle, dataset: PreparedDataset, split: str) -> Rows:
    """A split of prepared data; InputError unless it was encoded by the model's own pipeline."""
    dataset.require_pipeline(bundle.pipeline.digest, f"model {bundle.name}")
    return Rows(dataset.split(split), f"{split} split of {dataset.path}")


def rows_of_files(bundle: Bundle, sources: list[str], max_bad_rows: float) -> Rows:
    """Raw labelled files, encoded by the model's pipeline."""
    with tempfile.TemporaryDirectory(prefix="masknet-evaluate-") as folder:
        data = Path(folder) / "data"
        prepare(bundle.schema, {"test": sources}, data, pipeline=bundle.pipeline, max_bad_rows=max_bad_rows)
        return Rows(PreparedDataset.open(data).split("test"), ", ".join(sources))


def evaluate(bundle: Bundle, rows: Rows, baselines: Mapping[str, FloatN]) -> Evaluation:
    """Score the rows and compute every metric; `baselines` are other scores of the same rows."""
    label_N = rows.table[LABEL].to_numpy()
    if len(label_N) == 0:
        raise InputError(f"{rows.source} has no rows to evaluate")
    scores: dict[str, FloatN] = {MODEL: bundle.scorer.score_encoded(rows.table), **baselines}
    metrics = {name: score_metrics(label_N, score_N, groups_of(rows.table)) for name, score_N in scores.items()}
    return Evaluation(
        bundle, rows.source, label_N, scores, metrics, _by_familiarity(bundle, rows.table, label_N, scores)
    )


def _by_familiarity(bundle: Bundle, table: pa.Table, label_N: FloatN, scores: dict[str, FloatN]) -> dict[str, Any]:
    """AUC for groups (users) that training knew and for new ones apart; {} unless the group is a field with ids."""
    group = bundle.schema.group
    field = next((field for field in bundle.pipeline.fields if field.name == group), None)
    if field is None or not isinstance(field.encoder, Vocabulary | Managed) or field.spec.type == "list":
        return {}  # only a vocabulary, or a map of managed ids, tells the known from the new
    known_N = with_rows(table, bundle.pipeline, bundle.scorer.id_maps)[group].to_numpy() >= FIRST
    parts = {f"known {group}": known_N, f"new {group}": ~known_N}
    return {
        name: {
            "rows": int(part_N.sum()),
            "auc": {who: auc(label_N[part_N], score_N[part_N]) for who, score_N in scores.items()},
        }
        for name, part_N in parts.items()
    }


def write_report(evaluation: Evaluation, out: Path) -> Path:
    """Write report.html and metrics.json into `out`; return the report's path."""
    out.mkdir(parents=True, exist_ok=True)
    report = out / "report.html"
    with file_written_whole(report) as aside:
        aside.write_text(render(evaluation))
    with file_written_whole(out / "metrics.json") as aside:
        write_json(
            aside,
            {
                "model": evaluation.bundle.name,
                "source": evaluation.source,
                "rows": len(evaluation.label_N),
                "metrics": evaluation.metrics,
                "by_familiarity": evaluation.by_familiarity,
            },
        )
    return report
