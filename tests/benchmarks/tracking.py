"""What recording costs training: the time of steps that are recorded over that of steps that are not.

    python -m tests.benchmarks.tracking [--ids N] [--turns N] [--steps N] [--work DIR]

Steps are those of `tests.benchmarks.train` in bf16: 26 fields × 16 with 1 M ids, 3 parallel blocks × 400, batches of
4,096, loading included. As in `masknet train` every ten of them are reported together; the loss of each step and the
running AUC, speed and learning rate of each report are recorded. The ways take turns in this process, of so many steps
each, and a ratio is of one turn, so that both sides share what else the machine was doing:

off        nobody listens to the reports
SQLite     a run in a database file
server     a run in an `mlflow server` on loopback, which this machine's cores have to run beside training
away       a run whose server refuses connections: all stays on disk

A turn that records ends when MLflow has everything, which in `masknet train` happens once, at the end of all: the
ratios are upper bounds. On a machine that does other things they say little; "CPU of recording", what the calls and the
two threads behind them take of a core, in percent of the turn's time, says the same there.
"""

import argparse
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from features.allocator import keep_freed_memory
from features.batches import Batch
from features.dataset import PreparedDataset
from features.loader import BatchLoader
from serving.bundle import fields_of, tables_of
from tests.benchmarks.common import measured, write_result
from tests.benchmarks.train import BATCH, FIELDS, ROWS
from tests.mlflow_server import Server
from training.bench.train_data import make_data
from training.bench.trainer import Trainer, bench_config
from training.config import Config
from training.distributed import World, join_world
from training.fit.reporting import Reporter
from training.fit.state import Position
from training.progress import Silent, TrainingObserver
from training.quiet import quiet_libraries
from training.tracking import run as run_module
from training.tracking.opening import open_run
from training.tracking.run import Run

QUIET = Console(quiet=True)


def at(config: Config, uri: str) -> Config:
    """The configuration with another MLflow."""
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})


def batches_of(data: PreparedDataset) -> Iterator[Batch]:
    """Batches without end."""
    loader = BatchLoader(data.files("train"), data.pipeline, batch_size=BATCH, shuffle_seed=1)
    for epoch in range(10**6):
        yield from loader.epoch(epoch)


class Clocked(TrainingObserver):
    """Counts the CPU seconds of what it is told."""

    cpu = 0.0

    def steps_done(
        self, step: int, losses: list[float], auc: float | None, samples_per_second: float, **numbers: float
    ) -> None:
        start = time.thread_time()
        super().steps_done(step, losses, auc, samples_per_second, **numbers)
        self.cpu += time.thread_time() - start


class Way:
    """Steps whose reports go to one listener, on one model that all ways train in turn."""

    def __init__(
        self,
        trainer: Trainer,
        stream: Iterator[Batch],
        world: World,
        run: Run | None = None,
        threads: Iterable[threading.Thread] = (),
    ) -> None:
        self._trainer, self._stream, self._run = trainer, stream, run
        self._position = Position()
        listener = Clocked(run, QUIET) if run is not None else Silent()
        self._clocks = [time.pthread_getcpuclockid(thread.ident) for thread in threads if thread.ident is not None]
        self._listener, self.cpu = listener, 0.0
        self._reporter = Reporter(self._position, world, listener, lambda: False, lambda _: {"learning_rate": 1.0e-3})

    def turn(self, steps: int) -> float:
        """Seconds of so many steps and of what follows from them; `cpu` is what of a core recording took meanwhile."""
        start, before = time.perf_counter(), self._threads_cpu()
        self._reporter.begin()
        for _ in range(steps):
            output = self._trainer.step(self._stream)
            self._position.step += 1
            self._reporter.add(output, skipped=False)
        self._reporter.flush()
        if self._run is not None:
            self._run.flush()
            if self._run.is_connected:
                assert self._run.wait_until_sent(run_module.PATIENCE)
        seconds = time.perf_counter() - start
        if isinstance(self._listener, Clocked):
            self.cpu = self._listener.cpu + self._threads_cpu() - before
        return seconds

    def _threads_cpu(self) -> float:
        return sum(time.clock_gettime(clock) for clock in self._clocks)


def compare(data: PreparedDataset, turns: int, steps: int, work: Path, stack: ExitStack) -> list[dict[str, Any]]:
    """Rows of milliseconds a step, and of ratios."""
    config = bench_config(precision="bf16")
    server = Server(work)
    server.start()
    stack.callback(server.kill)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        away = f"http://127.0.0.1:{closed.getsockname()[1]}"
    about = {"path": str(data.path), **data.manifest}
    addresses = {"SQLite": f"sqlite:///{work}/own.db", "server": server.uri, "away": away}
    world = stack.enter_context(join_world())
    trainer = Trainer(config, tables_of(data.pipeline), fields_of(data.pipeline), world)
    stream = batches_of(data)
    seconds: dict[str, list[float]] = {name: [] for name in ("off", *addresses)}
    shares: dict[str, list[float]] = {name: [] for name in addresses}
    Way(trainer, stream, world).turn(steps)  # warms up
    for number in range(turns):
        for name in seconds:
            with ExitStack() as turn:
                run, others = None, set(threading.enumerate())
                if name != "off":  # opened and closed beside the clock: that is once in a training
                    out = work / f"{name}-{number}"
                    run = turn.enter_context(open_run(at(config, addresses[name]), about, out, False, console=QUIET))
                    run.wait_until_sent(run_module.PATIENCE if run.is_connected else 0)
                way = Way(trainer, stream, world, run, set(threading.enumerate()) - others)
                found = way.turn(steps)
                seconds[name].append(found / steps)
                if name in shares:
                    shares[name].append(100 * way.cpu / found)
        told = ", ".join(f"{name} {1000 * values[-1]:.1f}" for name, values in seconds.items())
        print(f"turn {number + 1} of {turns}, ms a step: {told}", flush=True)
    rows = [measured(name, [1000 * value for value in values], "ms a step") for name, values in seconds.items()]
    for name in addresses:
        ratios = [a / b for a, b in zip(seconds[name], seconds["off"], strict=True)]
        rows.append(measured(f"{name} over off", ratios, "ratio"))
        rows.append(measured(f"CPU of recording, {name}", shares[name], "% of the time"))
    return rows


def main() -> None:
    """Measure and write results/tracking.json."""
    parser = argparse.ArgumentParser(description="What recording costs training.")
    parser.add_argument("--ids", type=int, default=1_000_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="of one turn")
    parser.add_argument("--work", type=Path, help="folder for temporary files; by default the system's")
    options = parser.parse_args()
    quiet_libraries()
    keep_freed_memory()
    run_module.SHORT_PATIENCE = 0.5  # nothing is to be had from the one that is away
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.work)))
        rows = compare(
            make_data(work, fields=FIELDS, ids=options.ids, rows=ROWS), options.turns, options.steps, work, stack
        )
    facts = {"batch_size": BATCH, "ids": options.ids, "steps_per_turn": options.steps}
    write_result("tracking", {**facts, "threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    main()
