"""An engine's first requests: the bundle's golden rows, which must get their scores the way that others will.

Legend: G golden rows.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from features.columns import Rows
from features.files import read_json
from serving.calibration import ScoreN
from serving.golden import GOLDEN_FILE, TOLERANCE, golden_encoded, golden_rows, recorded, require_near
from serving.trace import Trace

if TYPE_CHECKING:
    from serving.ranking.engine import RankingEngine

ROUNDED = 0.02  # tolerance with rounded tables, or behind a calibration: a wrong table or field order is off by more
SIZES = (1, 64, 500, 2048)  # candidates: what libraries prepare for a number of rows is ready for the usual ones


def warm_up(engine: "RankingEngine") -> None:
    """InputError unless the golden rows get their scores, as rows and, without managed fields, as requests.

    Of managed fields only ids are on record, which no request can hold.
    """
    scorer, place = engine.bundle.scorer, str(engine.bundle.path)
    golden = read_json(engine.bundle.path / GOLDEN_FILE, "bundle")
    tolerance = ROUNDED if engine.bound is None else TOLERANCE + 2 * engine.bound
    record_G = recorded(golden)
    require_near(engine.uncalibrated(golden_encoded(scorer, golden)), record_G, "scores", place, tolerance)
    rows = golden_rows(scorer, golden)
    shared = {*engine.schema.context, *engine.schema.date_columns} & rows.keys()
    candidates = {name: values for name, values in rows.items() if name not in shared}
    if not candidates:
        return
    if not engine.bundle.pipeline.managed:
        served_G = np.array([_as_request(engine, rows, shared, row) for row in range(len(record_G))], np.float32)
        expected_G = scorer.calibration.apply(record_G)
        plain = scorer.calibration.kind == "none"
        require_near(served_G, expected_G, "scores in a request", place, tolerance if plain else ROUNDED)
    for size in SIZES:
        many = {name: (values * (size // len(values) + 1))[:size] for name, values in candidates.items()}
        engine.rank({name: rows[name][-1] for name in shared}, many, 1)


def _as_request(engine: "RankingEngine", rows: Mapping[str, list[Any]], shared: set[str], row: int) -> float:
    """The score of one golden row among the others' candidates, in its own context."""
    trace = Trace("/rank")
    candidates: Rows = {name: values for name, values in rows.items() if name not in shared}
    engine.rank({name: rows[name][row] for name in shared}, candidates, 1, trace=trace)
    score_G: ScoreN | None = trace.score_N
    assert score_G is not None
    return float(score_G[row])
