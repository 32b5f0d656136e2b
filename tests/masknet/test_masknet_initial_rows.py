"""A table's initial rows: the same wherever and however the table is sharded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from masknet.model import Table, initial_rows


def test_initial_rows_follow_name_and_seed() -> None:
    names = ["user", "users", "ad", "da", "a", "b"]
    tables = [Table(name=name, features=(name,), rows=20, pooling="sum") for name in names]
    drawn = [initial_rows(table, 16, seed) for table in tables for seed in (0, 1, 2)]
    for i, rows in enumerate(drawn):
        assert rows.shape == (20, 16)
        assert not any(torch.allclose(rows, other) for other in drawn[:i])
    assert torch.equal(drawn[0], initial_rows(Table(name="user", features=("user",), rows=20, pooling="mean"), 16, 0))


def test_initial_rows_leave_the_global_generator_alone() -> None:
    table, before = Table(name="user", features=("user",), rows=20, pooling="sum"), torch.random.get_rng_state()
    initial_rows(table, 16, 0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("given", "std"), [((), 0.01), ((0.3,), 0.3)])
def test_initial_rows_scale(given: tuple[float, ...], std: float) -> None:
    rows = initial_rows(Table(name="user", features=("user",), rows=10_000, pooling="sum"), 16, 3, *given).double()
    # 160,000 draws: the standard errors are .18 % of std (of the deviation) and .25 % (of the mean); five of each
    assert float(rows.std()) == pytest.approx(std, rel=9e-3)
    assert float(rows.mean()) == pytest.approx(0.0, abs=1.3e-2 * std)


def test_initial_rows_are_those_of_any_other_process() -> None:
    script = (
        "from masknet.model import Table, initial_rows\n"
        "print(initial_rows(Table(name='user', features=('user',), rows=3, pooling='sum'), 2, 5).tolist())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "17"}  # Python's own hash of a name would differ
    root = Path(__file__).parents[2]
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env=environment,
    )
    assert answer.stdout.strip() == str(
        initial_rows(Table(name="user", features=("user",), rows=3, pooling="sum"), 2, 5).tolist()
    )
