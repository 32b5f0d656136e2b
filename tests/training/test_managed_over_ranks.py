"""Managed ids in several processes: the same map everywhere, and the one that a single process makes of the batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
WORKER = Path(__file__).parent / "managed_worker.py"
WORLDS = (1, 2, 4)

State = dict[str, torch.Tensor]
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, State]:
    """What each process ended with, by how many there were and its rank."""
    out = tmp_path_factory.mktemp("managed")
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(out), str(rank)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        said = [worker.communicate(timeout=180)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * 4, "\n".join(said)
    return {path.stem: load_file(path) for path in out.glob("*.safetensors")}


def maps_of(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("table ")}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("resumed", ["", "-resumed"], ids=["whole", "resumed from two processes"])
def test_every_rank_has_the_map_of_one_process(seen: dict[str, State], world: int, resumed: str) -> None:
    expected = maps_of(seen["1-0"])
    assert len(expected) == 1 + 4 + 4 + 5  # the step; ids, rows, counted and what the policy keeps
    for rank in range(world):
        found = maps_of(seen[f"{world}-{rank}{resumed}"])
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].tolist() == tensor.tolist(), name


def test_the_stream_evicts(seen: dict[str, State]) -> None:
    """Or the tests here would show nothing: the three policies have kept different ids."""
    ids = [seen["1-0"][f"t00{table}.ids"] for table in range(3)]
    assert all(len(table) == 13 and int((table < 2**63 - 1).sum()) == 12 for table in ids)
    assert len({tuple(table.tolist()) for table in ids}) == 3


@pytest.mark.parametrize("world", [2, 4])
def test_tables_are_those_of_one_process(seen: dict[str, State], world: int) -> None:
    for name, tensor in seen["1-0"].items():
        if name.startswith("table "):
            # sums over ranks round otherwise than sums over rows
            torch.testing.assert_close(seen[f"{world}-0"][name], tensor, rtol=1e-4, atol=1e-5)
