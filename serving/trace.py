"""What one request took and saw, noted on its way; metrics and the prediction log read it afterwards."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

ScoreN = npt.NDArray[np.float32]
Stage = Literal["queue", "parse", "fetch", "encode", "lookup", "model", "respond"]
Role = Literal["champion", "challenger", "shadow"]


@dataclass
class Trace:
    """One request, from its arrival on.

    `lap` ends a stage: the time since the last one ended is the stage's. The engine sets what it has seen, the routes
    what was asked; scores are the served ones (after calibration) of all rows, in the order of the request.
    """

    route: str
    request_id: str = ""
    seconds: dict[Stage, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    name: str = ""
    version: str = ""
    role: Role = "champion"
    context: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    rows: int = 0
    missing: Mapping[str, int] = field(default_factory=dict)  # values, by field; a context's counts once
    unknown: Mapping[str, int] = field(default_factory=dict)  # ids of the never-seen, by field; likewise
    values: Mapping[str, int] = field(default_factory=dict)  # of which the two are parts
    score_N: ScoreN | None = None
    time: datetime | None = None  # that date fields read, sent or taken as now; a column of times counts before it

    def __post_init__(self) -> None:
        self._last = self.started

    def lap(self, stage: Stage) -> None:
        """The stage ends now."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
