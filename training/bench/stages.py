"""Where the time of a training step goes, by marks in the middle of it.

Every mark ends a stage: what has passed since the mark before belongs to it. On CUDA marks are events of the main
stream, so that a stage has its kernels' time and what the stream waited for, and the host's time does not count.
"""

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from features.batches import Batch
from training.bench.trainer import Trainer
from training.embeddings.sharding import unwrapped

# Of a step, in their order.
LOAD, COPY, EMBEDDING, DENSE = "load", "copy", "embedding forward", "dense forward"
BACKWARD, SPARSE, OPTIMIZER, IDLE = "dense backward", "embedding backward and update", "dense optimizer", "idle"
STAGES = (LOAD, COPY, EMBEDDING, DENSE, BACKWARD, SPARSE, OPTIMIZER, IDLE)


class Stages:
    """Marks the steps of a trainer."""

    def __init__(self, trainer: Trainer, device: torch.device) -> None:
        self._trainer, self._device = trainer, device
        self._marks: list[tuple[str, Any]] = []
        network = trainer.model.network
        unwrapped(trainer.dmp).register_forward_pre_hook(lambda *_: self.mark(IDLE))
        network.register_forward_pre_hook(self._embedded)
        network.register_forward_hook(lambda *_: self.mark(DENSE))
        optimizer = trainer.optimizer
        step = optimizer.step

        def timed_step(*arguments: Any, **keywords: Any) -> None:
            self.mark(SPARSE)
            step(*arguments, **keywords)
            self.mark(OPTIMIZER)

        optimizer.step = timed_step

    def mark(self, stage: str) -> None:
        """End a stage."""
        if self._device.type == "cuda":
            stamp: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            stamp.record()
        else:
            stamp = time.perf_counter()
        self._marks.append((stage, stamp))

    def step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One step: milliseconds of every stage."""
        self._marks.clear()
        self.mark("begin")
        self._trainer.step(self._timed(batches))
        self.mark(IDLE)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found = dict.fromkeys(STAGES, 0.0)
        for (_, before), (stage, after) in pairwise(self._marks):
            found[stage] += before.elapsed_time(after) if self._device.type == "cuda" else 1e3 * (after - before)
        return found

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in self._loaded(batches):
            move = batch.to

            def timed_to(*arguments: Any, move: Any = move, **keywords: Any) -> Batch:
                moved: Batch = move(*arguments, **keywords)
                self.mark(COPY)
                return moved

            batch.to = timed_to  # type: ignore[method-assign]
            yield batch

    def _loaded(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            self.mark(IDLE)
            batch = next(batches, None)
            self.mark(LOAD)
            if batch is None:
                return
            yield batch

    def _embedded(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.mark(EMBEDDING)
        if args[0].requires_grad:
            args[0].register_hook(lambda _: self.mark(BACKWARD))  # type: ignore[no-untyped-call]
