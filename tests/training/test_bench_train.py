"""`masknet bench train`: its result and the stages of a step."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from features.loader import BatchLoader
from serving.bundle import fields_of, tables_of
from training.bench.stages import COPY, IDLE, LOAD, STAGES, Stages
from training.bench.train_data import make_data
from training.bench.trainer import Trainer, bench_config
from training.distributed import join_world

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_every_stage_of_a_step_is_seen(tmp_path: Path) -> None:
    data = make_data(tmp_path, fields=4, ids=400, rows=640)
    loader = BatchLoader(data.files("train"), data.pipeline, batch_size=64)
    with join_world() as world:
        config = bench_config(precision="fp32", batch_size=64)
        trainer = Trainer(config, tables_of(data.pipeline), fields_of(data.pipeline), world)
        stages = Stages(trainer, world.device)
        batches = loader.epoch(0)
        table = [stages.step(batches) for _ in islice(range(10), 10)]
        with pytest.raises(StopIteration):
            stages.step(batches)
    assert all(set(step) == set(STAGES) for step in table)
    for step in table[:-2]:  # the last two steps' batches were loaded before
        assert all(step[stage] > 0 for stage in STAGES)
    assert all(step[stage] > 0 for step in table for stage in set(STAGES) - {LOAD, COPY, IDLE})


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="another result where there is CUDA")
def test_the_result_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "train.json"
    command = [sys.executable, "-m", "training", "bench", "train", "--quick", "--profile", "--json", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(out.read_text())
    assert json.loads(done.stdout) == result
    names = {row["name"] for row in result["rows"]}
    for precision in ("fp32", "bf16"):
        assert {f"{stage}, {precision}" for stage in (*STAGES, "training", "step", "gemm")} <= names
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["gemm, bf16"]["p50"] > 0
    assert 0 < rows["share of roofline, bf16"]["p50"] <= 1
    assert rows["training, bf16"]["p20"] <= rows["training, bf16"]["p80"]
