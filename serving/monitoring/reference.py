"""What a model's rows and scores looked like in training: the bundle's reference.json, which drift is told from.

Counts alone, by bins of ids and values: no raw value stands in it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from features.drift import CountK, counted_scores, grouped, score_starts, top_bins
from features.errors import InputError
from features.files import read_json
from features.pipeline import FeaturePipeline
from features.stats import Edges
from features.validation import Frozen, validate

REFERENCE_FILE = "reference.json"

Count = Annotated[int, Field(ge=0)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1)]
FloatN = npt.NDArray[np.floating]


class FieldReference(Frozen):
    """A field in training: rows, or items of lists, that were missing, never seen, in each of `bins`, in any other.

    `edges` are where the bins of a value field begin.
    """

    edges: tuple[float, ...] = ()
    bins: tuple[int, ...]
    counts: Counts


class ScoreReference(Frozen):
    """Served scores of rows: where their bins begin but the first, and rows.

    The model has not learned from them, but for a day's that had no test split.
    """

    rows_of: str
    starts: tuple[float, ...]
    counts: Counts


class Reference(Frozen):
    """All fields by their names, and the score."""

    fields: dict[str, FieldReference]
    score: ScoreReference

    @property
    def edges(self) -> Edges:
        """Of value fields, as `features.stats` takes them."""
        return {name: np.array(field.edges) for name, field in self.fields.items() if field.edges}


def field_references(
    pipeline: FeaturePipeline, counts: Iterable[dict[str, CountK]], edges: Edges
) -> dict[str, FieldReference]:
    """The fields' references from counts by bin, of one training split or several days that are added up."""
    found: dict[str, FieldReference] = {}
    parts = list(counts)
    for name in pipeline.names:
        count_K = np.sum([part[name] for part in parts], axis=0)
        top = top_bins(count_K)
        found[name] = FieldReference(
            edges=tuple(edges.get(name, np.empty(0)).tolist()),
            bins=tuple(top.tolist()),
            counts=tuple(grouped(count_K, top).tolist()),
        )
    return found


def score_reference(score_N: FloatN, weight_N: FloatN | None, rows_of: str) -> ScoreReference:
    """The scores' reference; `weight_N` says how many rows each stands for, `rows_of` what they are called."""
    starts = score_starts(score_N, weight_N)
    return ScoreReference(
        rows_of=rows_of,
        starts=tuple(starts.tolist()),
        counts=tuple(counted_scores(score_N, starts, weight_N).tolist()),
    )


def load_reference(bundle: Path, pipeline: FeaturePipeline) -> Reference:
    """A bundle's reference.

    Raises:
        InputError: the bundle was written without one, or it is not of these fields.
    """
    path = bundle / REFERENCE_FILE
    if not path.exists():
        raise InputError(f"bundle {bundle} has no {REFERENCE_FILE} to tell drift from: train the model anew")
    reference = validate(Reference, read_json(path, "bundle"), f"bundle {path}")
    if tuple(reference.fields) != pipeline.names:
        raise InputError(f"bundle {path}: the fields are not those of the pipeline")
    return reference
