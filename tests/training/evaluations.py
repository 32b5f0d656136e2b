"""Evaluations made by hand, for tests of what is written about them."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa

from features.metrics import score_metrics
from serving.bundle import Bundle
from training.evaluation.findings import MODEL, Evaluation, Findings, Resampled, Subject
from training.evaluation.results import (
    Comparison,
    Cost,
    Difference,
    Drift,
    Estimate,
    FieldImportance,
    MaskStatistics,
    Slice,
    Verdict,
)

ROWS = 2000
HOSTILE = """<script>alert("1")</script> & 'x' $\\frac$ ]]> <b>"""


def bundle(name: str = "clicks-ranker", group: str | None = "user_id", kind: str = "none") -> Bundle:
    """What the report reads of a bundle."""
    scorer = SimpleNamespace(models=(None, None), calibration=SimpleNamespace(kind=kind))
    manifest = {"run_id": None, "pipeline_digest": "ab" * 32, "model": {"kind": "parallel", "blocks": 2}}
    schema = SimpleNamespace(group=group)
    return cast(Bundle, SimpleNamespace(name=name, digest="cd" * 32, manifest=manifest, schema=schema, scorer=scorer))


def around(value: float | None, width: float = 0.004) -> Estimate:
    return Estimate(None) if value is None else Estimate(value, value - width, value + width)


def difference(
    value: float, verdict: Verdict = "not told apart", p: float = 0.4, test: Any = "bootstrap"
) -> Difference:
    return Difference(value, value - 0.0025, value + 0.0035, p, test, verdict)


def part(name: str, change: float | None = None, verdict: Verdict | None = None, **facts: Any) -> Slice:
    """A slice of the first model, and of the second where there is a change to it."""
    metrics: dict[str, dict[str, float | None]] = {MODEL: {"auc": 0.7125, "logloss": 0.5125, "calibration": 1.0625}}
    found = Slice(field="device", kind="value", name=name, rows=500, clicks=125, metrics=metrics)
    if change is not None:
        p = 0.012 if verdict in ("better", "worse") else 0.6
        metrics["rival"] = {"auc": None, "logloss": 0.5125 - change, "calibration": 0.9375}
        found = replace(found, logloss=difference(change, verdict or "not told apart"), verdict=verdict, p_corrected=p)
    return replace(found, **facts)


def evaluation(
    *, rival: bool = False, field: str = "device", model: str = MODEL, baselines: bool = True, calibrated: bool = False
) -> Evaluation:
    """Random scores, and findings of every kind."""
    random = np.random.default_rng(1)
    score_N = random.beta(2, 5, ROWS)
    label_N = (random.random(ROWS) < score_N).astype(np.float64)
    scores = {model: score_N}
    names = [model]
    if rival:
        names.append("rival")
        scores["rival"] = np.clip(score_N + random.normal(0, 0.1, ROWS), 0.001, 0.999)
    if baselines:
        scores |= {"base rate": np.full(ROWS, 0.25), "logistic regression": random.beta(2, 5, ROWS)}
    before = {model: score_N**1.5} if calibrated else {}
    group_N = random.integers(0, 50, ROWS)
    found = Evaluation(
        subjects=tuple(Subject(name, bundle(kind="platt" if calibrated else "none"), pa.table({})) for name in names),
        source="test split of data",
        label_N=label_N,
        group_N=group_N,
        scores=scores,
        uncalibrated=before,
        metrics={
            name: score_metrics(label_N, one_N, group_N, before.get(name, one_N)) for name, one_N in scores.items()
        },
        metrics_before={name: score_metrics(label_N, one_N, group_N) for name, one_N in before.items()},
        by_familiarity={"known user_id": {"rows": 1900, "auc": dict.fromkeys(scores, 0.7)}},
    )
    return replace(found, findings=findings(found, field))


def findings(found: Evaluation, field: str = "device") -> Findings:
    names = [subject.name for subject in found.subjects]
    slices = [part(f"{field} = {value}", field=field) for value in ("phone", "desktop")]
    if found.rival:
        slices = [
            part(f"{field} = phone", 0.0123, "worse", field=field),
            part(f"{field} = desktop", -0.0045, "better", field=field),
            part(f"{field}: unknown", 0.0001, "not told apart", field=field, kind="unknown"),
            part("2026-01-01", 0.0002, "not told apart", field="time", kind="time"),
        ]
    slices = [replace(one, metrics=dict(zip(names, one.metrics.values(), strict=True))) for one in slices]
    fields = [field, "user_id", "a field whose name goes on and on, over more than a line"]
    masks = MaskStatistics(fields, np.array([[0.5, -0.25, 0.125], [1.5, 0.0, 0.75]]), np.full((2, 3), 0.0625), [])
    return Findings(
        resampled=Resampled(1000, "user_id"),
        estimates={name: {key: around(value) for key, value in one.items()} for name, one in found.metrics.items()},
        comparisons=[comparison(found.model, name) for name in list(found.scores)[1:]],
        slices=slices,
        importance={name: [important(one, place) for place, one in enumerate(fields)] for name in names},
        masks=dict.fromkeys(names, masks),
        drift=Drift("train → test", {field: 0.0125, "user_id": 2.5, "cross": None, "hour": 0.15}, 0.0375),
        cost={name: [Cost(size, 1.25, 1.5, 2.25, 123_456, 7_890_123, 3 << 20, "a chip") for size in (100, 500)]
              for name in names},
    )  # fmt: skip


def important(field: str, place: int) -> FieldImportance:
    return FieldImportance(field, 0.0375, 0.0025, 0.0625 - 0.03125 * place, 0.0125)


def comparison(first: str, second: str) -> Comparison:
    return Comparison(
        first,
        second,
        {
            "auc": difference(-0.0061, "worse", 0.0004),
            "logloss": difference(0.00425, "not told apart"),
            "calibration": difference(-0.0321, "better", 0.02),
        },
        f"{first} is worse than {second} in AUC and not told apart in log loss.",
        difference(-0.0061, "worse", 0.0002, "DeLong"),
    )
