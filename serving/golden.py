"""Golden rows: synthetic rows whose scores a bundle must reproduce wherever it is loaded."""

from typing import Any

import numpy as np

from features.columns import Rows
from features.encoders import Encoder, Quantile, Vocabulary
from features.errors import InputError
from features.pipeline import FittedField
from features.schema import ListField
from serving.scorer import Scorer

GOLDEN_FILE = "golden.json"
ROWS = 16
TOLERANCE = 1e-5  # another CPU sums in another order; a wrong table, vocabulary or field order is off by far more


def make_golden(scorer: Scorer, seed: int = 0) -> dict[str, Any]:
    """Rows drawn from the fitted vocabularies and boundaries (no person's data), and their scores."""
    random = np.random.default_rng(seed)
    columns = {field.name: _draw(field, random) for field in scorer.pipeline.fields}
    return {"rows": columns, "scores": scorer.score(columns).tolist()}


def check_golden(scorer: Scorer, golden: Any, bundle: str) -> None:
    """InputError unless every golden row gets its score to 1e-5."""
    rows: Rows = golden["rows"]
    off_N = np.abs(scorer.score(rows) - np.asarray(golden["scores"]))
    if not np.all(off_N <= TOLERANCE):
        worst = int(np.nanargmax(off_N))
        raise InputError(f"bundle {bundle} is refused: golden row {worst} scores {off_N[worst]:.2e} off its record")


def _draw(field: FittedField, random: np.random.Generator) -> list[Any]:
    """Known values, with a missing one first and a never-seen one second."""
    if isinstance(field.encoder, Quantile):
        edges = field.encoder.boundaries if len(field.encoder.boundaries) else np.zeros(1)
        return [None, *(float(random.choice(edges)) + float(random.choice([-0.5, 0.0, 0.5])) for _ in range(ROWS - 1))]
    if isinstance(field.spec, ListField):
        return [
            None,
            ["\u0000never seen"],
            *([_value(field.encoder, random) for _ in range(1 + i % 3)] for i in range(ROWS - 2)),
        ]
    return [None, "\u0000never seen", *(_value(field.encoder, random) for _ in range(ROWS - 2))]


def _value(encoder: Encoder, random: np.random.Generator) -> str:
    if isinstance(encoder, Vocabulary) and len(encoder.values):
        return str(encoder.values[int(random.integers(len(encoder.values)))].as_py())
    return f"golden {random.integers(1_000_000)}"
