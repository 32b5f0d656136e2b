"""What a prepared data set looks like, in numbers a person would ask for."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.checks import LABEL
from features.encoders import MISSING, UNKNOWN
from features.pipeline import FeaturePipeline
from features.schema import ListField, NumericField


def profile(pipeline: FeaturePipeline, splits: dict[str, tuple[pa.Table, pa.Table]]) -> dict[str, Any]:
    """Rows and positives per split, and per field and split: values, missing, unknown, distinct, quantiles.

    Args:
        pipeline: the fitted pipeline.
        splits: by name, the canonical rows and their encoded form.
    """
    return {
        "splits": {name: _split(canonical) for name, (canonical, _) in splits.items()},
        "fields": {
            field.name: {
                "type": field.spec.type,
                "encoder": field.encoder.kind,
                "ids": field.encoder.num_ids,
                **{name: _field(field.spec, *(table[field.name] for table in pair)) for name, pair in splits.items()},
            }
            for field in pipeline.fields
        },
    }


def _split(canonical: pa.Table) -> dict[str, Any]:
    rows = canonical.num_rows
    positives = int(pc.sum(canonical[LABEL]).as_py() or 0)
    return {"rows": rows, "positives": positives, "rate": positives / rows if rows else None}


def _field(spec: Any, canonical: pa.ChunkedArray, encoded: pa.ChunkedArray) -> dict[str, Any]:
    is_list = isinstance(spec, ListField)
    ids = (pc.list_flatten(encoded) if is_list else encoded).to_numpy()
    values = pc.list_flatten(canonical) if is_list else canonical
    facts: dict[str, Any] = {
        "values": len(ids),
        "missing": int((ids == MISSING).sum()),
        "unknown": int((ids == UNKNOWN).sum()),
        "distinct": pc.count_distinct(values, mode="only_valid").as_py(),
    }
    if isinstance(spec, NumericField):
        numbers = values.drop_null().to_numpy()
        levels = (0.0, 0.25, 0.5, 0.75, 1.0)
        facts["quantiles"] = np.quantile(numbers, levels).tolist() if len(numbers) else None
    return facts
