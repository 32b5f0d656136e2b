"""How the servers of the benchmark are asked to rank, and what they answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa

from training.bench.serve_model import TOP_K, Request

_ARROW = "application/vnd.apache.arrow.stream"
_METADATA = b"masknet"


@dataclass(frozen=True)
class Way:
    """A route and a format.

    Args:
        name: of the format.
        path: of the route.
        headers: beside host and content-length.
        body: a request as the route takes it.
        scores: of an answer, by candidate: those that it names.
    """

    name: str
    path: str
    headers: Mapping[str, str]
    body: Callable[[Request], bytes]
    scores: Callable[[bytes], dict[int, float]]


def _json_body(request: Request) -> bytes:
    return orjson.dumps({"context": request.context, "candidates": request.candidates, "top_k": TOP_K})


def _json_scores(answer: bytes) -> dict[int, float]:
    return {item["index"]: item["score"] for item in orjson.loads(answer)["items"]}


def _arrow_body(request: Request) -> bytes:
    about = orjson.dumps({"context": request.context, "top_k": TOP_K})
    table = pa.table(request.candidates).replace_schema_metadata({_METADATA: about})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _arrow_scores(answer: bytes) -> dict[int, float]:
    table = pa.ipc.open_stream(answer).read_all()
    return dict(zip(table["index"].to_pylist(), table["score"].to_pylist(), strict=True))


def _mlflow_body(request: Request) -> bytes:
    """MLflow knows rows alone: the context stands in each."""
    rows = request.rows
    return orjson.dumps({"dataframe_split": {"columns": list(rows), "data": list(zip(*rows.values(), strict=True))}})


def _mlflow_scores(answer: bytes) -> dict[int, float]:
    found: list[Any] = orjson.loads(answer)["predictions"]
    return {i: float(one["score"] if isinstance(one, dict) else one) for i, one in enumerate(found)}


_JSON_HEADERS = {"content-type": "application/json"}
JSON = Way("JSON", "/rank", _JSON_HEADERS, _json_body, _json_scores)
ARROW = Way("Arrow", "/rank", {"content-type": _ARROW, "accept": _ARROW}, _arrow_body, _arrow_scores)
MLFLOW = Way("JSON rows", "/invocations", _JSON_HEADERS, _mlflow_body, _mlflow_scores)
