"""Norms with running statistics in several processes: what they do is what one process does with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
WORKER = Path(__file__).parent / "ranks_worker.py"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "batch": ("batch", {}),
    "power_v": ("power_v", {}),
    "power in warm-up": ("power", {}),
    "power": ("power", {"warmup_steps": 3}),
    "power, no warm-up": ("power", {"warmup_steps": 0}),
    "power, groups": ("power", {"warmup_steps": 3, "group_scaling": 2}),
    "unified in warm-up": ("unified", {}),
    "unified": ("unified", {"warmup_steps": 3, "window": 2}),
    "unified, outliers": ("unified", {"warmup_steps": 3, "window": 2, "outlier_filtering": True}),
    "prepbn": ("prepbn", {}),
}
STEPS = 10  # the worker's

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[State]]:
    """What each process saw, by how many there were."""
    out = tmp_path_factory.mktemp("ranks")
    job = out / "job.json"
    job.write_text(json.dumps({"cases": CASES, "out": str(out)}))
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(job), str(rank)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        said = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0, 0], "\n".join(said)
    return {n: [load_file(out / f"{n}-{rank}.safetensors") for rank in range(n)] for n in (1, 2, 3)}


@pytest.mark.parametrize("world", [2, 3], ids=["2 ranks", "3 ranks, one without rows"])
@pytest.mark.parametrize("case", CASES)
def test_ranks_are_one_process(case: str, world: int, seen: dict[int, list[State]]) -> None:
    (alone,), ranks = seen[1], seen[world]
    keys = [key for key in alone if key.startswith(f"{case}|")]
    assert keys
    for key in keys:
        if key.endswith(" input"):
            together = torch.cat([rank[key] for rank in ranks])
        else:
            together = ranks[0][key]
            assert all(torch.equal(rank[key], together) for rank in ranks), f"{key} differs between ranks"
        # Sums of 14 rows in another order, fp64; ten steps and the roots of small powers make it some hundred times as
        # much. Rows or ranks of a wrong weight are off by 1e-2.
        torch.testing.assert_close(
            together, alone[key], rtol=1e-10, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_outliers_were_filtered(seen: dict[int, list[State]]) -> None:
    """A step that is skipped has the running power of before in the window."""
    (alone,), skipped = seen[1], []
    for step in range(1, STEPS):
        before = alone[f"unified, outliers|{step - 1} embedding_norm.running_power"]
        window = alone[f"unified, outliers|{step} embedding_norm.power_window"]
        skipped.append(torch.equal(window[(step + 1) % 2], before))
    assert any(skipped)
    assert not all(skipped)
