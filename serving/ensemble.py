"""Ensembles: one bundle of several bundles' members, whose scores are averaged before the calibration."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from features.errors import InputError
from features.id_maps import IdMap
from serving.bundle import Bundle, Calibrate, Check, Evaluate, Refer, write_bundle
from serving.members import Member


def write_ensemble(
    out: Path,
    bundles: Sequence[Bundle],
    *,
    name: str,
    run_id: str | None,
    evaluate: Evaluate,
    calibrate: Calibrate | None = None,
    reference: Refer | None = None,
    check: Check | None = None,
) -> Bundle:
    """Write the bundle whose members are those of all the given ones, and open it.

    Args:
        out: a folder that does not exist yet.
        bundles: trained on rows of the same encoding, with the same model configuration. Their own calibrations are
            of other scores than the mean, and are left out.
        name: the registered model's name.
        run_id: the MLflow run that registers it, or None.
        evaluate: called with the ensemble's scorer; returns the metrics to record, by split.
        calibrate: called with the scorer before that, not calibrated yet; returns its last step.
        reference: called with the calibrated scorer; returns what drift is to be told from.
        check: called with the calibrated scorer; returns which fast backends may serve it.

    Raises:
        InputError: there are none, or two cannot be members of one bundle; names them and what differs.
    """
    if not bundles:
        raise InputError("an ensemble needs one bundle at least")
    first = bundles[0]
    for other in bundles[1:]:
        _require_alike(first, other)
    members = [
        Member.of(model, run)
        for bundle in bundles
        for model, run in zip(bundle.scorer.models, bundle.manifest["members"], strict=True)
    ]
    return write_bundle(
        out,
        name=name,
        config=first.config,
        schema=first.schema,
        pipeline=first.pipeline,
        members=members,
        sampling_rate=first.scorer.sampling_rate,
        run_id=run_id,
        evaluate=evaluate,
        id_maps=first.scorer.id_maps,
        calibrate=calibrate,
        reference=reference,
        check=check,
    )


def _require_alike(first: Bundle, other: Bundle) -> None:
    """InputError unless two bundles' models read the same rows and are of one shape."""
    pair = f"bundles {first.path} and {other.path} cannot be one ensemble"
    for key in ("schema_digest", "pipeline_digest", "sampling_rate"):
        mine, theirs = first.manifest[key], other.manifest[key]
        if mine != theirs:
            raise InputError(f"{pair}: {key} differs ({mine} and {theirs})")
    mine, theirs = first.config.model_dump(), other.config.model_dump()
    for key, value in mine.items():
        if theirs[key] != value:
            raise InputError(f"{pair}: model.{key} differs ({value} and {theirs[key]})")
    for table, id_map in first.scorer.id_maps.items():
        if not _same_rows(id_map, other.scorer.id_maps[table]):
            raise InputError(f"{pair}: the managed ids of {table} have other rows in each")


def _same_rows(first: IdMap, other: IdMap) -> bool:
    return np.array_equal(first.ids_K, other.ids_K) and np.array_equal(first.rows_K, other.rows_K)
