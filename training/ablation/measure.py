"""How long cells take, measured in turns so that all see the same machine.

A cell's time is compared with the baseline's in the same turn. The network alone is measured, on random embeddings:
tables, loading and their optimizer are the same for all cells.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from features.dataset import PreparedDataset
from masknet.folding import fold
from masknet.networks import ParallelMaskNet, SerialMaskNet, build_network
from masknet.norms import set_progress
from masknet.norms.running import RunningNorm
from training.ablation.cells import Cell
from training.fit.precision import computing

TURNS, REPEATS = 15, 5
MOST_ROWS, SERVED_ROWS = 4096, 500  # of a training step, and of a request
_LATE = 1 << 20  # steps that running norms have behind them: far beyond any warm-up

Measured = dict[str, dict[str, Any]]


def measure(
    cells: list[Cell], baseline: str, dataset: PreparedDataset, progress: Callable[[int, int], None]
) -> Measured:
    """A training step and the folded network's forward pass over 500 rows of each cell, in ms and over the baseline's.

    A turn's time is the least of five, which other processes have disturbed least. Each is
    {"rows", "p20", "p50", "p80", "ratio": {"p20", "p50", "p80"}} over the turns.
    """
    fields = len(dataset.pipeline.fields)
    stages: dict[str, tuple[_Timed, _Timed]] = {
        cell.name: (_Step(cell, fields), _Forward(cell, fields)) for cell in cells
    }
    taken: dict[str, list[list[float]]] = {name: [[], []] for name in stages}
    for turn in range(TURNS + 1):
        for name, pair in stages.items():
            for place, stage in enumerate(pair):
                milliseconds = min(stage() for _ in range(REPEATS))
                if turn > 0:  # the first call of everything is slower
                    taken[name][place].append(milliseconds)
        progress(turn, TURNS)
    found: Measured = {}
    for name, pair in stages.items():
        found[name] = {
            what: {
                "rows": pair[place].rows,
                **_quantiles(taken[name][place]),
                "ratio": _quantiles(np.divide(taken[name][place], taken[baseline][place]).tolist()),
            }
            for place, what in enumerate(("step", "forward"))
        }
    return found


def _network(cell: Cell, fields: int) -> SerialMaskNet | ParallelMaskNet:
    """A fresh network whose norms are past their warm-up and their schedule, as they are for most of a model's life."""
    torch.manual_seed(0)
    network = build_network(cell.config.model, fields)
    set_progress(network, 1.0)
    for module in network.modules():
        if isinstance(module, RunningNorm):
            module.steps.fill_(_LATE)
    return network


def _quantiles(values: list[float]) -> dict[str, float]:
    return {f"p{q}": float(f"{np.percentile(values, q):.4g}") for q in (20, 50, 80)}


class _Timed(Protocol):
    """Does something with so many rows, and returns the milliseconds it took."""

    rows: int

    def __call__(self) -> float: ...


class _Step:
    """Forward, backward and optimizer of the network, in training."""

    def __init__(self, cell: Cell, fields: int) -> None:
        self.rows = min(MOST_ROWS, cell.config.train.batch_size)
        self._network = _network(cell, fields).train()
        self._emb_BFd = 0.01 * torch.randn(self.rows, fields, cell.config.model.embedding_dim)
        self._label_B = (torch.rand(self.rows) < 0.25).float()
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=1e-4, fused=True)
        self._precision = cell.config.train.precision

    def __call__(self) -> float:
        started = time.perf_counter()
        self._optimizer.zero_grad()
        emb_BFd = self._emb_BFd.clone().requires_grad_()
        with computing(self._precision, "cpu"):
            logit_B = self._network(emb_BFd)
        loss = functional.binary_cross_entropy_with_logits(logit_B.float(), self._label_B)
        torch.autograd.backward(loss)
        self._optimizer.step()
        return 1000 * (time.perf_counter() - started)


class _Forward:
    """The folded network on a request's rows."""

    def __init__(self, cell: Cell, fields: int) -> None:
        self.rows = SERVED_ROWS
        self._network = fold(_network(cell, fields))
        self._emb_BD = 0.01 * torch.randn(self.rows, fields * cell.config.model.embedding_dim)
        self._no_context = torch.empty(1, 0)

    def __call__(self) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            self._network(self._no_context, self._emb_BD)
        return 1000 * (time.perf_counter() - started)
