"""A bundle with every kind of field, by hand: random weights, and values that its clients send."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from features.encoders import AnyEncoder, Cross, DatePart, Hash, Identity, LogBucket, Quantile, Scale, Vocabulary
from features.pipeline import FeaturePipeline
from features.schema import Schema
from masknet.config import MaskNetConfig
from masknet.model import MaskNet
from serving.bundle import fields_of, tables_of, write_bundle
from serving.members import Member

RATE = 0.2
SCHEMA = Schema.model_validate(
    {
        "name": "every kind",
        "label": {"column": "click"},
        "context": ["user", "age"],
        "negative_sampling": {"rate": RATE},
        "fields": [
            {"name": "price", "type": "numeric", "encoder": "standard"},
            {"name": "liked", "type": "list", "share_with": "user", "max_length": 4},
            {"name": "user", "type": "categorical"},
            {"name": "hour", "type": "date", "from": "seen", "part": "hour", "format": "%d.%m.%Y %H:%M"},
            {"name": "item", "type": "categorical", "encoder": "hash", "buckets": 50},
            {"name": "slot", "type": "categorical", "encoder": "identity", "buckets": 8},
            {"name": "codes", "type": "list", "encoder": "identity", "buckets": 6, "pooling": "sum"},
            {"name": "genres", "type": "list", "separator": "|"},
            {"name": "age", "type": "numeric", "encoder": "quantile"},
            {"name": "clicks", "type": "numeric", "encoder": "log_bucket", "buckets": 40},
            {"name": "income", "type": "numeric", "encoder": "log1p", "normalize": True},
            {"name": "share", "type": "numeric", "encoder": "minmax"},
            {"name": "position", "type": "categorical", "encoder": "identity", "buckets": 9,
             "training_only": {"default": 1}},
            {"name": "delay", "type": "numeric", "encoder": "standard", "training_only": {"default": 2.5}},
            {"name": "user_x_genre", "type": "cross", "of": ["user", "genres"], "buckets": 70},
            {"name": "weekday", "type": "date", "from": "seen", "part": "weekday", "timezone": "Asia/Tokyo"},
        ],
    }
)  # fmt: skip
ENCODERS: dict[str, AnyEncoder] = {
    "price": Scale("standard", 10.0, 4.0),
    "user": Vocabulary(pa.array(["ann", "bob", "cat"])),
    "hour": DatePart(24, "hour", "UTC"),
    "item": Hash(50),
    "slot": Identity(8),
    "codes": Identity(6),
    "genres": Vocabulary(pa.array(["drama", "war"])),
    "age": Quantile(np.array([20.0, 40.0])),
    "clicks": LogBucket(40),
    "income": Scale("log1p"),
    "share": Scale("minmax", 0.0, 8.0),
    "position": Identity(9),
    "delay": Scale("standard", 1.0, 0.5),
    "user_x_genre": Cross(70),
    "weekday": DatePart(7, "weekday", "Asia/Tokyo"),
}
PIPELINE = FeaturePipeline.build(SCHEMA.fields, ENCODERS)
CONFIG = MaskNetConfig(embedding_dim=4, blocks=1, block_width=6, head=())
VALUES = ["price", "income", "share", "delay"]
TIME = "2024-05-05T18:30:00+02:00"  # Sunday, 16:30 UTC; in Tokyo it is Monday already
CONTEXT = {"user": "bob", "age": 33}
CANDIDATES: dict[str, list[Any]] = {
    "price": [12.0, None, -3.5],
    "liked": [["ann", "ann", "cat"], ["bob"], None],
    "item": ["x", 17, None],
    "slot": [3, "7", 99],
    "codes": [[0, 5], ["2"], []],
    "genres": ["war|drama", ["war"], "opera"],
    "clicks": [0, 250, None],
    "income": [1e5, 0.0, None],
    "share": [2.0, 9.0, None],
}
# One Arrow type a column, as files and frames have them.
PLAIN = CANDIDATES | {"item": ["x", "17", None], "slot": [3, 7, 99], "codes": [["0", "5"], ["2"], []]}
PLAIN |= {"genres": [["war", "drama"], ["war"], ["opera"]]}


def write_every_kind(path: Path) -> Path:
    """Random weights, far from those of any initialization."""
    model = MaskNet(CONFIG, tables_of(PIPELINE), fields_of(PIPELINE))
    generator = torch.Generator().manual_seed(2)
    tables = {t.name: torch.randn(t.rows, 4, generator=generator) for t in tables_of(PIPELINE)}
    network = {name: torch.randn(w.shape, generator=generator) / 3 for name, w in model.dense_state().items()}
    rest = {"schema": SCHEMA, "pipeline": PIPELINE, "members": [Member(network, tables)], "sampling_rate": RATE}
    write_bundle(path, name="every", config=CONFIG, run_id=None, evaluate=lambda scorer: {}, **rest)
    return path


def in_rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Columns as rows."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def rows_at(time: Any) -> list[dict[str, Any]]:
    """The candidates as whole rows, shown at a time."""
    return [row | CONTEXT | {"seen": time} for row in in_rows(CANDIDATES)]
