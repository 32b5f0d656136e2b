"""The bundle: a trained model as a folder of plain files, whole or refused.

manifest.json       format, model configuration, schema and pipeline digests, sampling rate, metrics, run id, and
                    every file's SHA-256
manifest.sha256     SHA-256 of manifest.json
schema.yaml         the schema that the model was trained with
pipeline/           the fitted encoders
members/00/         network.safetensors, and embeddings/ with one file per table, numbered in the order of the fields
id_maps/            where fields are managed: the ids that have rows, one file per such table, numbered as the tables
golden.json         synthetic rows with the scores they must get
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from features.encoders import Scale
from features.errors import InputError, one_line
from features.files import folder_written_whole, hash_tree, read_json, sha256_file, write_json
from features.id_maps import IdMap
from features.pipeline import FeaturePipeline, FittedField
from features.schema import Schema, load_schema
from features.validation import validate
from masknet.config import MaskNetConfig
from masknet.model import MaskNet, Table
from masknet.values import ValueField
from serving.golden import GOLDEN_FILE, check_golden, make_golden
from serving.id_map_files import load_id_maps, save_id_maps
from serving.scorer import Scorer

FORMAT = 2
_MANIFEST, _SEAL = "manifest.json", "manifest.sha256"
_KEYS = {"format", "name", "model", "schema_digest", "pipeline_digest", "sampling_rate", "run_id", "metrics", "files"}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: verified files, and a scorer that has given the golden rows their scores."""

    path: Path
    manifest: dict[str, Any]
    schema: Schema
    scorer: Scorer

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
        return sha256_file(self.path / _MANIFEST)


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
    network: dict[str, torch.Tensor],
    tables: dict[str, torch.Tensor],
    sampling_rate: float,
    run_id: str | None,
    evaluate: Any,
    id_maps: Mapping[str, IdMap] = MappingProxyType({}),
) -> Bundle:
    """Write a bundle that appears only when it is whole, and open it.

    Args:
        out: a folder that does not exist yet.
        name: the registered model's name.
        config: shape of the network.
        schema: the schema of the training data.
        pipeline: the fitted encoders.
        network: all weights but the tables' (`MaskNet.dense_state`).
        tables: whole embedding tables by their names.
        sampling_rate: the kept share of negatives in the training split, which every score is corrected for.
        run_id: the MLflow run that trained it, or None.
        evaluate: called with the bundle's scorer; returns the metrics to record, by split.
        id_maps: of every managed table, by the tables' names.
    """
    with folder_written_whole(out) as folder:
        (folder / "schema.yaml").write_text(yaml.safe_dump(schema.plain(), sort_keys=False))
        pipeline.save(folder / "pipeline")
        member = folder / "members" / "00"
        (member / "embeddings").mkdir(parents=True)
        save_file(network, member / "network.safetensors")
        for index, table in enumerate(tables_of(pipeline)):
            save_file({"weight": tables[table.name]}, _table_file(member, index), metadata={"field": table.name})
        save_id_maps(folder, tables_of(pipeline), id_maps)
        scorer = _load_scorer(folder, config, pipeline, sampling_rate)
        write_json(folder / GOLDEN_FILE, make_golden(scorer))
        manifest = {
            "format": FORMAT,
            "name": name,
            "model": config.model_dump(mode="json"),
            "schema_digest": sha256_file(folder / "schema.yaml"),
            "pipeline_digest": pipeline.digest,
            "sampling_rate": sampling_rate,
            "run_id": run_id,
            "metrics": evaluate(scorer),
            "files": hash_tree(folder),
        }
        write_json(folder / _MANIFEST, manifest)
        (folder / _SEAL).write_text(sha256_file(folder / _MANIFEST))
    return Bundle(out, manifest, schema, scorer)


def load_bundle(path: Path) -> Bundle:
    """Open a bundle after checking every file against its digest and the golden rows against their scores.

    Raises:
        InputError: there is no bundle, a file is missing or changed, the format is another, or a golden
            row gets another score; the message names the file or the row.
    """
    manifest = _verified_manifest(path)
    schema = load_schema(path / "schema.yaml")
    pipeline = FeaturePipeline.load(path / "pipeline")
    if pipeline.digest != manifest["pipeline_digest"]:
        raise InputError(f"bundle {path} is damaged: pipeline/ is not the one in manifest.json")
    config = validate(MaskNetConfig, manifest["model"], f"bundle {path / _MANIFEST}")
    scorer = _load_scorer(path, config, pipeline, manifest["sampling_rate"])
    check_golden(scorer, read_json(path / GOLDEN_FILE, "bundle"), str(path))
    return Bundle(path, manifest, schema, scorer)


def _verified_manifest(path: Path) -> dict[str, Any]:
    if not (path / _MANIFEST).is_file():
        raise InputError(f"{path} is no bundle: {_MANIFEST} is missing")
    if not (path / _SEAL).is_file():
        raise InputError(f"{path} is no bundle: {_SEAL} is missing")
    if (path / _SEAL).read_bytes() != sha256_file(path / _MANIFEST).encode():
        raise InputError(f"bundle {path} is damaged: {_MANIFEST} does not match {_SEAL}")
    manifest = read_json(path / _MANIFEST, "bundle")
    if isinstance(manifest, dict) and manifest.get("format", FORMAT) != FORMAT:
        update = "update it" if manifest["format"] > FORMAT else "train the model anew"
        raise InputError(f"bundle {path} has format {manifest['format']}; this program reads {FORMAT}: {update}")
    if not isinstance(manifest, dict) or not manifest.keys() >= _KEYS:
        raise InputError(f"bundle {path} is damaged: {_MANIFEST} lacks keys")
    found = hash_tree(path)
    strangers = found.keys() - manifest["files"].keys() - {_MANIFEST, _SEAL}
    if strangers:
        raise InputError(f"bundle {path} is damaged: {min(strangers)} is not in {_MANIFEST}")
    for file, digest in manifest["files"].items():
        if file not in found:
            raise InputError(f"bundle {path} is damaged: {file} is missing")
        if found[file] != digest:
            raise InputError(f"bundle {path} is damaged: the SHA-256 of {file} is not the one in {_MANIFEST}")
    return manifest


def _table_file(member: Path, index: int) -> Path:
    return member / "embeddings" / f"{index:03d}.safetensors"  # field names may hold what file names cannot


def _load_scorer(path: Path, config: MaskNetConfig, pipeline: FeaturePipeline, sampling_rate: float) -> Scorer:
    member, tables = path / "members" / "00", tables_of(pipeline)
    model = MaskNet(config, tables, fields_of(pipeline))
    try:
        weights = [load_file(_table_file(member, index))["weight"] for index in range(len(tables))]
        model.load_weights(load_file(member / "network.safetensors"), weights)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise InputError(f"bundle {path}: the weights do not fit the model: {one_line(error)}") from None
    return Scorer(pipeline, model, sampling_rate, load_id_maps(path, tables, pipeline))
