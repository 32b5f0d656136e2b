"""What a prepared data set looks like, in numbers a person would ask for, and what they should look at twice."""

from typing import Any

import numpy as np
import numpy.typing as npt

from features.dataset import SPLITS
from features.drift import DRIFT, stability_index
from features.encoders import FIRST, MISSING, UNKNOWN, DatePart, Hash, Identity, Managed, Scale, Vocabulary
from features.fields import CrossField, NumericField
from features.metrics import binned_auc
from features.pipeline import FeaturePipeline, FittedField
from features.stats import BINS, FieldStats, Stats

TOP = 10
_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
LEAK = 0.98
ID_LIKE = 0.9  # distinct values per row
REPEATED = 0.01
_OUTSIDE = 0.001  # share of an identity field's values that are beyond its buckets


def profile(pipeline: FeaturePipeline, stats: Stats, edges: dict[str, npt.NDArray[np.float64]]) -> dict[str, Any]:
    """Rows and positives per split, each field's counts per split, and findings: sentences about what is odd."""
    splits = {name: _split(stats, number) for number, name in enumerate(SPLITS) if stats.rows_LS[:, number].sum()}
    fields: dict[str, Any] = {}
    for field in pipeline.fields:
        found = stats.fields[field.name]
        fields[field.name] = {
            "type": field.spec.type,
            "encoder": field.encoder.kind if not isinstance(field.encoder, Scale) else field.encoder.rule,
            "ids": None if isinstance(field.encoder, Scale) else field.encoder.num_ids,
            "psi": stability_index(found.count_LSK[:, 0].sum(0), found.count_LSK[:, 2].sum(0)),
            "auc": _auc_alone(found),
            **{name: _field(field, found, SPLITS.index(name)) for name in splits},
        }
    facts = {"splits": splits, "repeated_rows": stats.rows.repeated, "fields": fields}
    return {**facts, "findings": _findings(pipeline, stats, facts)}


def _split(stats: Stats, number: int) -> dict[str, Any]:
    negatives, positives = (int(count) for count in stats.rows_LS[:, number])
    low, high = stats.time_range[number].tolist()
    times = {"from": low, "to": high} if np.isfinite(low) else None
    rows = negatives + positives
    return {"rows": rows, "positives": positives, "rate": positives / rows, "time": times}


def _field(field: FittedField, stats: FieldStats, number: int) -> dict[str, Any]:
    count_K = stats.count_LSK[:, number].sum(0)
    facts: dict[str, Any] = {
        "values": int(count_K.sum()),
        "missing": int(count_K[MISSING]),
        "unknown": 0 if isinstance(field.encoder, Scale) else int(count_K[UNKNOWN]),
        "distinct": stats.distinct[number].distinct + _told_apart(field, count_K),
    }
    if isinstance(field.spec, NumericField):
        numbers = stats.numbers[number]
        facts["distinct"] = len(numbers.table()[0])
        facts["quantiles"] = numbers.quantiles(np.array(_LEVELS)).tolist() or None
    else:
        facts["top"] = _top(field, stats, number, count_K)
    return facts


def _told_apart(field: FittedField, count_K: npt.NDArray[np.int64]) -> int:
    """Distinct known values of a field whose bins hold one id each."""
    if isinstance(field.encoder, (Scale, Hash, Managed)) or field.encoder.num_ids > BINS:
        return 0
    return int(np.count_nonzero(count_K[FIRST:]))


def _top(field: FittedField, stats: FieldStats, number: int, count_K: npt.NDArray[np.int64]) -> list[list[Any]] | None:
    """The most frequent values and their counts; None for a cross, whose values have no names."""
    encoder = field.encoder
    if type(encoder) in (Hash, Managed) and not isinstance(field.spec, CrossField):
        named = sorted(stats.named[number].items(), key=lambda pair: (-pair[1], pair[0]))
        return [[value, count] for value, count in named[:TOP]]
    if not isinstance(encoder, (Vocabulary, Identity, DatePart)):
        return None
    known_K = count_K.copy()
    known_K[:FIRST] = 0
    if encoder.num_ids > BINS:
        if isinstance(encoder, Identity):
            return None  # its bins hold several ids
        known_K[BINS - 1] = 0
    best = np.argsort(-known_K, kind="stable")[:TOP]
    first = 1 if isinstance(encoder, DatePart) and encoder.part in ("day", "month") else 0
    names = (lambda i: encoder.values[i].as_py()) if isinstance(encoder, Vocabulary) else (lambda i: str(i + first))
    return [[names(int(place) - FIRST), int(known_K[place])] for place in best if known_K[place]]


def _auc_alone(stats: FieldStats) -> float | None:
    """AUC on validation and test of each bin's rate of positives in train: what the field would do on its own."""
    train_LK, other_LK = stats.count_LSK[:, 0], stats.count_LSK[:, 1:].sum(1)
    if not train_LK.sum():
        return None
    base = train_LK[1].sum() / train_LK.sum()
    rate_K = (train_LK[1] + base) / (train_LK.sum(0) + 1.0)
    return binned_auc(other_LK[0], other_LK[1], rate_K)


def _findings(pipeline: FeaturePipeline, stats: Stats, facts: dict[str, Any]) -> list[str]:
    found = []
    for field in pipeline.fields:
        found += [f"field {field.name!r} {text}" for text in _field_findings(field, facts)]
    if facts["repeated_rows"] > REPEATED:
        found.append(f"{facts['repeated_rows']:.1%} of the rows repeat another row in every field, label and time")
    for name, split in facts["splits"].items():
        if split["rate"] in (0.0, 1.0):
            found.append(f"split {name} has one class only: every label is {int(split['rate'])}")
    train, test = stats.time_range[0], stats.time_range[2]
    if test[0] < train[1]:
        found.append("time travel: the oldest test row is older than the newest training row; use --split time:…")
    return found


def _field_findings(field: FittedField, facts: dict[str, Any]) -> list[str]:
    about = facts["fields"][field.name]
    train, found = about.get("train"), []
    if train is not None:
        rows = facts["splits"]["train"]["rows"]
        if train["missing"] == train["values"]:
            found.append("has no value at all in train")
        elif train["distinct"] <= 1 and not train["missing"] and not train["unknown"]:
            found.append("is constant in train")
        if field.spec.type == "categorical" and rows > 1 and train["distinct"] > ID_LIKE * rows:
            found.append(f"has about as many values ({train['distinct']:,}) as train has rows: is it an id of the row?")
        if isinstance(field.encoder, Identity) and train["unknown"] > _OUTSIDE * train["values"]:
            found.append(
                f"has {train['unknown']:,} values in train that are not below its {field.encoder.buckets} buckets"
            )
    if about["psi"] is not None and about["psi"] > DRIFT:
        found.append(f"drifts from train to test (PSI {about['psi']:.2f}, above {DRIFT})")
    if about["auc"] is not None and max(about["auc"], 1 - about["auc"]) > LEAK:
        found.append(f"tells the label on its own (AUC {about['auc']:.3f}): does it know the future?")
    return found
