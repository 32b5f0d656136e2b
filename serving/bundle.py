"""The bundle: a trained model as a folder of plain files, whole or refused.

manifest.json       format, model configuration, schema and pipeline digests, sampling rate, metrics, run ids, and
                    every file's SHA-256
manifest.sha256     SHA-256 of manifest.json
schema.yaml         the schema that the model was trained with
pipeline/           the fitted encoders
members/00/         network.safetensors, and embeddings/ with one file per table, numbered in the order of the fields;
                    an ensemble has members/01/ and so on besides
id_maps/            where fields are managed: the ids that have rows, one file per such table, numbered as the tables
calibration.json    the curve from the members' mean score to the one that is served
backends.json       which fast backends it may be served by, and backends/ with what they need; may be absent
golden.json         synthetic rows with the scores they must get
reference.json      counts of the training rows and of validation scores, which drift is told from; may be absent
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from features.encoders import Scale
from features.errors import InputError
from features.files import folder_written_whole, read_json, sha256_file, write_json
from features.id_maps import IdMap
from features.pipeline import FeaturePipeline, FittedField
from features.schema import Schema, load_schema
from features.validation import validate
from masknet.config import MaskNetConfig
from masknet.model import Table
from masknet.values import ValueField
from serving.backends.record import Backends
from serving.calibration import CALIBRATION_FILE, Calibration
from serving.golden import GOLDEN_FILE, check_golden, make_golden
from serving.id_map_files import load_id_maps, save_id_maps
from serving.manifest import MANIFEST, seal, verified_manifest
from serving.members import Member, load_members, save_members
from serving.monitoring.reference import REFERENCE_FILE, Reference
from serving.scorer import Scorer

Evaluate = Callable[[Scorer], Any]
Calibrate = Callable[[Scorer], Calibration]
Check = Callable[[Scorer], Backends | None]
Refer = Callable[[Scorer], Reference]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: verified files, and a scorer that has given the golden rows their scores."""

    path: Path
    manifest: dict[str, Any]
    schema: Schema
    scorer: Scorer
    backends: Backends | None = None  # which fast ones have passed; None of a bundle whose training checked none

    @property
    def name(self) -> str:
        """The registered model's name."""
        return str(self.manifest["name"])

    @property
    def pipeline(self) -> FeaturePipeline:
        return self.scorer.pipeline

    @property
    def config(self) -> MaskNetConfig:
        """Shape of the network."""
        return MaskNetConfig.model_validate(self.manifest["model"])

    @property
    def digest(self) -> str:
        """SHA-256 of manifest.json, and through it of everything."""
        return sha256_file(self.path / MANIFEST)

    def version(self, registered: str | None) -> str:
        """What users call this model: its version in the registry, or outside one part of its digest."""
        return registered or self.digest[:12]


def tables_of(pipeline: FeaturePipeline) -> tuple[Table, ...]:
    """The embedding tables that a pipeline's fields need: one per field that owns an encoder of ids, in their order."""
    owners = [field for field in pipeline.fields if field.owner == field.name and not field.is_value]
    return tuple(_table(owner, [f for f in pipeline.fields if f.owner == owner.name]) for owner in owners)


def _table(owner: FittedField, sharing: list[FittedField]) -> Table:
    # To single ids all pooling is the same, so lists decide how the table pools.
    pooling = next((field.pooling for field in sharing if field.is_list), owner.pooling)
    assert not isinstance(owner.encoder, Scale)  # those are no owners of tables
    features = tuple(field.name for field in sharing)
    return Table(name=owner.name, features=features, rows=owner.encoder.num_ids, pooling=pooling)


def fields_of(pipeline: FeaturePipeline) -> tuple[str | ValueField, ...]:
    """The order of F: a pipeline's fields with ids by name, and those with values."""
    return tuple(
        ValueField(name=field.name, normalize=field.normalize) if field.is_value else field.name
        for field in pipeline.fields
    )


def write_bundle(
    out: Path,
    *,
    name: str,
    config: MaskNetConfig,
    schema: Schema,
    pipeline: FeaturePipeline,
    members: Sequence[Member],
    sampling_rate: float,
    run_id: str | None,
    evaluate: Evaluate,
    id_maps: Mapping[str, IdMap] = MappingProxyType({}),
    calibrate: Calibrate | None = None,
    reference: Refer | None = None,
    check: Check | None = None,
) -> Bundle:
    """Write a bundle that appears only when it is whole, and open it.

    Args:
        out: a folder that does not exist yet.
        name: the registered model's name.
        config: shape of the network.
        schema: the schema of the training data.
        pipeline: the fitted encoders.
        members: one trained model, or several whose scores are averaged.
        sampling_rate: the kept share of negatives in the training split, which every score is corrected for.
        run_id: the MLflow run that registers it, or None.
        evaluate: called with the bundle's scorer; returns the metrics to record, by split.
        id_maps: of every managed table, by the tables' names.
        calibrate: called with the scorer before that, not calibrated yet; returns its last step.
        reference: called with the calibrated scorer; returns what drift is to be told from.
        check: called with the calibrated scorer; returns which fast backends may serve it, None for no word of them.
    """
    with folder_written_whole(out) as folder:
        (folder / "schema.yaml").write_text(yaml.safe_dump(schema.plain(), sort_keys=False))
        pipeline.save(folder / "pipeline")
        save_members(folder, members, tables_of(pipeline))
        save_id_maps(folder, tables_of(pipeline), id_maps)
        scorer = _load_scorer(folder, len(members), config, pipeline, sampling_rate)
        if calibrate is not None:
            scorer = scorer.with_calibration(calibrate(scorer))
            scorer.calibration.require_fits(sampling_rate, str(out))
        write_json(folder / CALIBRATION_FILE, scorer.calibration.plain())
        write_json(folder / GOLDEN_FILE, make_golden(scorer))
        if reference is not None:
            write_json(folder / REFERENCE_FILE, reference(scorer).model_dump(mode="json"))
        backends = None if check is None else check(scorer)
        if backends is not None:
            backends.save(folder)
        facts = {
            "name": name,
            "model": config.model_dump(mode="json"),
            "schema_digest": sha256_file(folder / "schema.yaml"),
            "pipeline_digest": pipeline.digest,
            "sampling_rate": sampling_rate,
            "run_id": run_id,
            "members": [member.run_id for member in members],
            "metrics": evaluate(scorer),
        }
        manifest = seal(folder, facts)
    return Bundle(out, manifest, schema, scorer, backends)


def load_bundle(path: Path) -> Bundle:
    """Open a bundle after checking every file against its digest and the golden rows against their scores.

    Raises:
        InputError: there is no bundle, a file is missing or changed, the format is another, the calibration is of
            other scores, or a golden row gets another score; the message names the file or the row.
    """
    manifest = verified_manifest(path)
    schema = load_schema(path / "schema.yaml")
    pipeline = FeaturePipeline.load(path / "pipeline")
    if pipeline.digest != manifest["pipeline_digest"]:
        raise InputError(f"bundle {path} is damaged: pipeline/ is not the one in {MANIFEST}")
    config = validate(MaskNetConfig, manifest["model"], f"bundle {path / MANIFEST}")
    rate = manifest["sampling_rate"]
    scorer = _load_scorer(path, len(manifest["members"]), config, pipeline, rate)
    if manifest["format"] > 2:
        data = read_json(path / CALIBRATION_FILE, "bundle")
        scorer = scorer.with_calibration(Calibration.from_plain(data, rate, str(path)))
    check_golden(scorer, read_json(path / GOLDEN_FILE, "bundle"), str(path))
    return Bundle(path, manifest, schema, scorer, Backends.load(path, len(manifest["members"])))


def _load_scorer(path: Path, count: int, config: MaskNetConfig, pipeline: FeaturePipeline, rate: float) -> Scorer:
    """The scorer of the `count` members in a folder, not calibrated."""
    tables = tables_of(pipeline)
    models = load_members(path, count, config, tables, fields_of(pipeline))
    return Scorer(pipeline, models, rate, load_id_maps(path, tables, pipeline))
