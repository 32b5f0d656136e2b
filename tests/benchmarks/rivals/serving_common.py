"""What both FastAPI services share: typed requests and answers, and the way from one to the other."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, create_model

from features.fields import NumericField
from features.schema import Schema
from serving.bundle import Bundle, load_bundle

Scores = Callable[[dict[str, list[Any]]], np.ndarray]


class Item(BaseModel):
    """A candidate's place in the request and its score."""

    index: int
    score: float


class Answer(BaseModel):
    """The best candidates, best first."""

    items: list[Item]


class Ranking:
    """Ranks by the scores of whole rows."""

    def __init__(self, scores: Scores) -> None:
        self._scores = scores

    def best(self, context: dict[str, Any], candidates: dict[str, list[Any]], top_k: int) -> Answer:
        """The context goes into every row."""
        count = len(next(iter(candidates.values())))
        score_N = self._scores({**{name: [value] * count for name, value in context.items()}, **candidates})
        best = np.argsort(-score_N, kind="stable")[:top_k]
        return Answer(items=[Item(index=int(i), score=float(score_N[i])) for i in best])


def make_app(schema: Schema, ranking: Ranking) -> FastAPI:
    """POST /rank with a pydantic model of the schema's fields, and GET /healthz."""
    types = {f.name: float if isinstance(f, NumericField) else str for f in schema.served_fields}
    context: dict[str, Any] = {name: (types[name] | None, ...) for name in schema.context}
    candidates: dict[str, Any] = {name: (list[types[name] | None], ...) for name in schema.candidate_fields}  # type: ignore[misc]
    request: Any = create_model(
        "RankRequest",
        context=(create_model("Context", **context), ...),
        candidates=(create_model("Candidates", **candidates), ...),
        top_k=(int, 10),
    )
    app = FastAPI()

    @app.post("/rank")
    def rank(asked: request) -> Answer:
        return ranking.best(asked.context.model_dump(), asked.candidates.model_dump(), asked.top_k)

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return app


def main(app_of: Callable[[Bundle, int], FastAPI]) -> None:
    """Serve a bundle until it is stopped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    app = app_of(load_bundle(given.bundle), given.threads)
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_level="warning")
