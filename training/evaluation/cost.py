"""What it takes to serve a model on this machine."""

import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from serving.bundle import Bundle
from training.bench.machine import cpu_name
from training.evaluation.results import Cost

CANDIDATES = (100, 500)
_WARM_UP, _REPEATS = 5, 50


def cost(bundle: Bundle, table: pa.Table, candidates: Sequence[int] = CANDIDATES, *, seed: int = 0) -> list[Cost]:
    """Time to score requests of so many encoded rows by the scorer that is served, and the model's size.

    Reading a request, encoding its raw rows and answering it come on top. Each request's rows are drawn from `table`;
    without any rows there is nothing to time, and no Cost. Parameters are those of all members, before folding.
    """
    if not table.num_rows:
        return []
    models = bundle.scorer.models
    tables = sum(weight.numel() for model in models for weight in model.embeddings.parameters())
    whole = sum(weight.numel() for model in models for weight in model.parameters())
    size = sum(file.stat().st_size for file in bundle.path.rglob("*") if file.is_file())
    device = f"{cpu_name()}, {torch.get_num_threads()} threads"
    encoded = table.select(bundle.pipeline.names)
    return [
        Cost(rows, *_milliseconds(bundle, encoded, rows, seed), whole - tables, tables, size, device)
        for rows in candidates
    ]


def _milliseconds(bundle: Bundle, table: pa.Table, rows: int, seed: int) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    random = np.random.default_rng(seed)
    seconds = []
    for _ in range(_WARM_UP + _REPEATS):
        request = table.take(pa.array(random.integers(0, table.num_rows, rows))).combine_chunks()
        started = time.perf_counter()
        bundle.scorer.score_encoded(request)
        seconds.append(time.perf_counter() - started)
    p20, p50, p80 = (1000 * np.quantile(seconds[_WARM_UP:], (0.2, 0.5, 0.8))).tolist()
    return p20, p50, p80
