"""What serving takes: percentiles of known times, and sizes counted from the bundle's files."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file

from features.dataset import PreparedDataset
from serving.bundle import Bundle
from serving.scorer import Scorer
from training.evaluation import cost as cost_module
from training.evaluation.cost import cost


def test_times_are_percentiles_after_the_warm_up(
    bundle: Bundle, dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, seen = [0.0], []

    def scored(self: Scorer, encoded: pa.Table) -> np.ndarray:
        seen.append(encoded.num_rows)
        now[0] += 100.0 if len(seen) <= 5 else len(seen) % 56 / 1000  # from the sixth on 6 to 55 ms, each once
        return np.zeros(encoded.num_rows, np.float32)

    monkeypatch.setattr(Scorer, "score_encoded", scored)
    monkeypatch.setattr(cost_module.time, "perf_counter", lambda: now[0])
    (found,) = cost(bundle, dataset.split("test").slice(0, 7), candidates=[300])  # rows may come more than once
    assert seen == [300] * 55
    assert (found.p20_ms, found.p50_ms, found.p80_ms) == pytest.approx((15.8, 30.5, 45.2), rel=1e-9)
    assert found.candidates == 300


def test_sizes_are_those_of_the_files(bundle: Bundle, dataset: PreparedDataset) -> None:
    small, large = cost(bundle, dataset.split("test"))
    assert (small.candidates, large.candidates) == (100, 500)
    assert 0 < small.p20_ms <= small.p50_ms <= small.p80_ms
    weights = {path: load_file(path) for path in bundle.path.glob("members/**/*.safetensors")}
    tables = sum(w.size for path, found in weights.items() if "embeddings" in path.parts for w in found.values())
    network = load_file(bundle.path / "members" / "00" / "network.safetensors")
    assert small.table_parameters == tables
    # what is stored beside parameters: counts and running statistics of norms, of which this model has none
    assert small.network_parameters == sum(weight.size for weight in network.values())
    files = [Path(folder) / name for folder, _, names in os.walk(bundle.path) for name in names]
    assert small.bundle_bytes == large.bundle_bytes == sum(len(file.read_bytes()) for file in files)
    assert "threads" in small.device


def test_without_rows_nothing_is_timed(bundle: Bundle, dataset: PreparedDataset) -> None:
    assert cost(bundle, dataset.split("test").slice(0, 0)) == []
