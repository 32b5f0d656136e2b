"""`masknet drift`: a prediction log, or any raw rows, against a model's training rows."""

import time
from pathlib import Path
from typing import Any

from features.errors import InputError
from features.files import file_written_whole, write_json
from serving.bundle import load_bundle
from serving.models import locate
from serving.monitoring.drift import Drifted, DriftResult, measure_drift
from serving.monitoring.reference import load_reference
from training.drift_page import render, sentences

DRIFTED = 3  # exit code


def run_drift(log: list[str], against: str, out: Path | None, threshold: float) -> tuple[dict[str, Any], list[str]]:
    """Measure, and write drift.html and drift.json into `out`, by default runs/drift/NAME-VERSION.

    Returns:
        What --json prints, and the result in words.

    Raises:
        InputError: the model, its reference, the rows or `out` are wrong; the message says which.
    """
    started = time.perf_counter()
    located = locate(against)
    bundle = load_bundle(located.path)
    version = bundle.version(located.version)
    out = out or Path("runs") / "drift" / f"{bundle.name}-{version}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}") from None
    result = measure_drift(bundle, version, log, threshold)
    answer = plain(result)
    with file_written_whole(out / "drift.html") as aside:
        aside.write_text(render(bundle, result, load_reference(bundle.path, bundle.pipeline)))
    with file_written_whole(out / "drift.json") as aside:
        write_json(aside, answer)
    answer |= {"report": str(out / "drift.html"), "seconds": time.perf_counter() - started}
    return answer, sentences(result)


def plain(result: DriftResult) -> dict[str, Any]:
    """The result as JSON."""
    return {
        "model": {"name": result.name, "version": result.version},
        "source": result.source,
        "rows": result.rows,
        "times": result.times,
        "versions": dict(result.versions),
        "threshold": result.threshold,
        "drifted": list(result.drifted),
        "score": {**_numbers(result.score), "scores": result.scores_of},
        "fields": {one.name: _numbers(one) | _rates(one) for one in result.fields},
    }


def _numbers(one: Drifted) -> dict[str, Any]:
    return {"psi": one.shift.psi, "chance": one.shift.chance, "p": one.shift.p, "verdict": one.verdict}


def _rates(one: Drifted) -> dict[str, Any]:
    """Shares of missing and never-seen values, in training and now."""
    before_G, now_G = one.shares_2G.tolist()
    return {"missing": [before_G[0], now_G[0]], "unknown": [before_G[1], now_G[1]]}
