"""Bundles of random weights, for tests of what is found out about a model."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from features.id_maps import IdMap
from features.pipeline import FeaturePipeline
from features.schema import Schema
from masknet.config import MaskNetConfig
from masknet.model import MaskNet
from serving.bundle import Bundle, fields_of, load_bundle, tables_of, write_bundle
from serving.members import Member

SHAPE: dict[str, Any] = {"embedding_dim": 4, "blocks": 2, "block_width": 6, "head": []}


def untrained(
    out: Path,
    schema: Schema,
    pipeline: FeaturePipeline,
    *,
    members: int = 1,
    id_maps: Mapping[str, IdMap] = MappingProxyType({}),
    **shape: Any,
) -> Bundle:
    """A bundle of so many members, their weights far from those of any initialization."""
    config = MaskNetConfig(**SHAPE | shape)
    generator, made = torch.Generator().manual_seed(3), []
    for _ in range(members):
        model = MaskNet(config, tables_of(pipeline), fields_of(pipeline))
        for weight in model.parameters():
            weight.data.copy_(torch.randn(weight.shape, generator=generator) / 2)
        made.append(Member.of(model))
    write_bundle(
        out,
        name="untrained",
        config=config,
        schema=schema,
        pipeline=pipeline,
        members=made,
        sampling_rate=schema.sampling_rate,
        run_id=None,
        evaluate=lambda scorer: {},
        id_maps=id_maps,
    )
    return load_bundle(out)
