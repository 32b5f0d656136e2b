"""From a request's bytes to an answer's, in one thread and without HTTP: parse, choose a model, fetch, score, write."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import orjson
import pyarrow as pa

from features.errors import InputError
from features.schema import Schema
from serving.api import arrow, requests
from serving.api.blame import refusal
from serving.api.bodies import ARROW, JSON, Form
from serving.api.columns import Columns
from serving.api.parts import Engine, Parts
from serving.api.requests import RankRequest, sent_of
from serving.trace import Trace


@dataclass(frozen=True)
class Answer:
    """An answer's body and content type, and what was asked where it was a ranking."""

    body: bytes
    media_type: str
    asked: RankRequest | None = None


def rank(parts: Parts, trace: Trace, body: bytes, form: Form, to_arrow: bool) -> Answer:
    """Answer /rank; ApiError says what is wrong. The trace learns what was seen."""
    trace.lap("queue")
    schema = parts.fleet.champion.schema
    asked = _parse_rank(parts, body, form, schema)
    engine, trace.role = parts.fleet.choose(asked.context)
    if _asks_other_fields(engine.schema, schema):
        asked = _parse_rank(parts, body, form, engine.schema)
    columns = _noted(trace, engine, asked.context, asked.candidates)
    trace.lap("parse")
    if parts.filler:
        parts.filler.fill(asked.context, columns)
        trace.lap("fetch")
        asked = replace(asked, candidates=_rows(columns))
    try:
        best = engine.rank(asked.context, asked.candidates, asked.top_k, asked.time, trace)
    except InputError as error:
        raise refusal(error, engine.schema, "candidates", body, form, asked.context, asked.candidates) from None
    index_K, score_K = [item.index for item in best], [item.score for item in best]
    if to_arrow:
        answer = Answer(arrow.ranking_stream(index_K, score_K, _model(engine)), ARROW, asked)
    else:
        items = [{"index": item.index, "score": item.score} for item in best]
        answer = Answer(orjson.dumps({"model": _model(engine), "items": items}), JSON, asked)
    trace.lap("respond")
    return answer


def predict(parts: Parts, trace: Trace, body: bytes, form: Form, to_arrow: bool) -> Answer:
    """Answer /predict, always by the champion; ApiError says what is wrong."""
    trace.lap("queue")
    engine = parts.fleet.champion
    rows = _parse_predict(parts, body, form, engine.schema)
    columns = _noted(trace, engine, {}, rows)
    trace.lap("parse")
    if parts.filler:
        parts.filler.fill({}, columns)
        trace.lap("fetch")
        rows = _rows(columns)
    try:
        score_N = engine.predict(rows, trace)
    except InputError as error:
        raise refusal(error, engine.schema, "rows", body, form, {}, rows) from None
    if to_arrow:
        answer = Answer(arrow.scores_stream(score_N, _model(engine)), ARROW)
    else:
        answer = Answer(orjson.dumps({"model": _model(engine), "scores": score_N.tolist()}), JSON)
    trace.lap("respond")
    return answer


def about(parts: Parts) -> dict[str, Any]:
    """The answer of /model."""
    engine = parts.fleet.champion
    scorer = engine.bundle.scorer
    return {
        "model": _model(engine),
        "metrics": engine.bundle.manifest["metrics"],
        "members": len(scorer.models),
        "calibration": scorer.calibration.kind,
        "engine": engine.about(),
        "life": parts.fleet.about(),
        "schema": engine.schema.plain(),
    }


def _parse_rank(parts: Parts, body: bytes, form: Form, schema: Schema) -> RankRequest:
    limits = parts.settings.limits
    if form == "json":
        return requests.parse_rank(body, schema, optional=parts.optional, rows=limits.rows)
    return arrow.parse_rank(body, schema, optional=parts.optional, rows=limits.rows, size=limits.body_bytes)


def _parse_predict(parts: Parts, body: bytes, form: Form, schema: Schema) -> Columns | pa.Table:
    limits = parts.settings.limits
    if form == "json":
        return requests.parse_predict(body, schema, optional=parts.optional, rows=limits.rows)
    return arrow.parse_predict(body, schema, optional=parts.optional, rows=limits.rows, size=limits.body_bytes)


def _asks_other_fields(one: Schema, other: Schema) -> bool:
    return one is not other and sent_of(one, with_times=False).mark != sent_of(other, with_times=False).mark


def _noted(
    trace: Trace, engine: Engine, context: Mapping[str, Any], columns: Columns | pa.Table
) -> MutableMapping[str, Any]:
    trace.name, trace.version, trace.context = engine.name, engine.version, context
    noted = arrow.ArrowColumns(columns) if isinstance(columns, pa.Table) else columns
    trace.columns = noted
    return noted


def _rows(columns: MutableMapping[str, Any]) -> Columns | pa.Table:
    return columns.table if isinstance(columns, arrow.ArrowColumns) else dict(columns)


def _model(engine: Engine) -> dict[str, str]:
    return {"name": engine.name, "version": engine.version}
