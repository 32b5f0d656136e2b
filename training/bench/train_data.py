"""Rows to measure training with: ids drawn evenly from tables of a given size, the hardest case for caches."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.dataset import PreparedDataset
from features.prepare import prepare
from features.schema import Schema


def make_data(folder: Path, *, fields: int, ids: int, rows: int) -> PreparedDataset:
    """A prepared data set that is all training split.

    Args:
        folder: where it is made.
        fields: categorical fields, each with a table of its own.
        ids: rows of all tables together.
        rows: impressions. Every other id of the first field is clicked more often, so that there is a gradient.
    """
    random, buckets = np.random.default_rng(0), ids // fields
    columns = {f"C{field + 1}": random.integers(buckets, size=rows) for field in range(fields)}
    label = (random.random(rows) < 0.1 + 0.3 * (columns["C1"] % 2)).astype(np.int64)
    raw = folder / f"raw-{ids}.parquet"
    pq.write_table(pa.table({"click": label, **columns}), raw)
    encoders = [{"name": name, "type": "categorical", "encoder": "identity", "buckets": buckets} for name in columns]
    schema = Schema.model_validate({"name": "bench", "label": {"column": "click"}, "fields": encoders})
    prepare(schema, {"train": [str(raw)]}, folder / f"data-{ids}")
    raw.unlink()
    return PreparedDataset.open(folder / f"data-{ids}")
