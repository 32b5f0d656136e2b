"""The ranking engine: scores and rankings from a bundle, without any notion of HTTP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from features.columns import Rows, as_table
from features.errors import InputError
from features.schema import Schema
from serving.bundle import Bundle
from serving.calibration import ScoreN


@dataclass(frozen=True)
class Ranked:
    """A candidate's place in the request, and its score, calibrated."""

    index: int
    score: float


class RankingEngine:
    """A loaded, verified model that ranks candidates and scores rows."""

    def __init__(self, bundle: Bundle, version: str) -> None:
        self.bundle = bundle
        self.version = version

    @property
    def name(self) -> str:
        """The registered model's name."""
        return self.bundle.name

    @property
    def schema(self) -> Schema:
        return self.bundle.schema

    def predict(self, rows: Rows) -> ScoreN:
        """Scores [N] of rows that have every field that is sent, and the columns that date fields read."""
        return self.bundle.scorer.score(rows)

    def rank(
        self, context: Mapping[str, Any], candidates: Rows, top_k: int, time: datetime | None = None
    ) -> list[Ranked]:
        """The best `top_k` candidates by their uncalibrated scores, best first, equal ones in the order of the request.

        Args:
            context: one value per field that all candidates share.
            candidates: the other fields, a column or a row each.
            top_k: how many to return, at least 1.
            time: when the candidates are shown, which date fields read; by default now. Without a zone it is UTC. It
                does not replace a column of times that is given.

        Raises:
            InputError: a field is given twice or not at all, or a value cannot be what its field says.
        """
        table = as_table(candidates)
        twice = [name for name in context if name in table.column_names]
        if twice:
            raise InputError(f"field {twice[0]!r} is given both in the context and per candidate")
        for name, value in context.items():
            table = table.append_column(name, _repeat(value, table.num_rows))
        for name in self.schema.date_columns:
            if name not in table.column_names:
                table = table.append_column(name, _repeat(time or datetime.now(UTC), table.num_rows))
        scorer = self.bundle.scorer
        order_by_N = scorer.uncalibrated(scorer.pipeline.encode(table))
        best = np.argsort(-order_by_N, kind="stable")[:top_k]
        score_K = scorer.calibration.apply(order_by_N[best])
        return [Ranked(int(index), float(score)) for index, score in zip(best, score_K, strict=True)]


def _repeat(value: Any, times: int) -> pa.Array:
    one: Sequence[Any] = [value]
    return pa.array(one).take(pa.array(np.zeros(times, np.int64)))
