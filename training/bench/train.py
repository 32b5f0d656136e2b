"""Samples per second of training, and where a step's time goes.

`masknet bench train` measures the parts of `masknet train` (`trainer`) on this machine's device, each precision in
turns. CPU: 26 categorical fields × 16 with 1 M ids in all, batches of 4,096, read from Parquet by the loader. CUDA:
39 fields with 50 M ids, batches of 32,768 that lie in memory. 3 parallel blocks × 400, r = 2, a head of 400, 400,
row-wise Adagrad for the tables, Adam for the rest.

`gemm` is this machine's rate of large products in a precision, `dense share` the network's own products, forward and
backward, at that rate, over the time of its passes; `roofline` the same and every embedding moved at the rate of a copy
(read, its gradient written and read, read and written with the update), over the time of the whole step.
"""

import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from features.allocator import keep_freed_memory
from features.batches import Batch
from features.dataset import PreparedDataset
from features.loader import BatchLoader
from masknet.kernels.products import linear
from serving.bundle import fields_of, tables_of
from training.bench import machine, report
from training.bench.stages import BACKWARD, DENSE, STAGES, Stages
from training.bench.timing import HostClock, quantiles
from training.bench.train_data import make_data
from training.bench.trainer import Trainer, bench_config
from training.distributed import World, join_world
from training.fit.precision import Precision, computing, set_precision

SHAPES: dict[str, dict[str, int]] = {
    "cpu": {"fields": 26, "ids": 1_000_000, "batch": 4096, "rows": 400_000},
    "cuda": {"fields": 39, "ids": 50_000_000, "batch": 32_768, "rows": 600_000},
}
QUICK = {"fields": 26, "ids": 26_000, "batch": 512, "rows": 8_192}
PRECISIONS: dict[str, tuple[Precision, ...]] = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16")}
TURNS, STEPS, IN_MEMORY = 10, 8, 16  # turns of so many steps; batches in memory
WIDTH = {"cpu": 2048, "cuda": 8192}  # of a large product
COPIED = 1 << 26  # numbers


def run_train(out: Path | None, quick: bool, profile: bool) -> dict[str, Any]:
    """Measure, and write to `out`.

    Raises:
        InputError: `out` cannot be written.
    """
    if out is not None:
        report.check_writable(out)
    keep_freed_memory()
    result = measure(quick, profile)
    if out is not None:
        report.write(out, result)
    return result


def shown(result: dict[str, Any]) -> str:
    """A line per row, with a stage's share of the step."""
    lines = [report.device_line(result)]
    for row in result["rows"]:
        share = f", {row['share']:.1%} of the step" if "share" in row else ""
        lines.append(f"{row['name']}: {row['p50']:,g} {row['unit']} (p20 {row['p20']:,g}, p80 {row['p80']:,g}){share}")
    return "\n".join(lines)


def measure(quick: bool, profile: bool) -> dict[str, Any]:
    """The result, on the GPU if there is one."""
    with join_world() as world, tempfile.TemporaryDirectory() as folder:
        kind = world.device.type
        shape = QUICK if quick else SHAPES[kind]
        sizes = {key: shape[key] for key in ("fields", "ids", "rows")}
        data = make_data(Path(folder), **sizes)
        trainers = {precision: _trainer(precision, data, shape["batch"], world) for precision in PRECISIONS[kind]}
        streams = {precision: _stream(data, shape["batch"], kind) for precision in trainers}
        rows = _speeds(trainers, streams, shape["batch"], 2 if quick else TURNS, world)
        if profile:
            copied = _copy_rate(world.device)
            for precision, trainer in trainers.items():
                rows += _profile(precision, trainer, streams[precision], shape, world, copied, 4 if quick else 40)
        for stream in streams.values():
            stream.close()
    return {
        "device": machine.facts(),
        "versions": machine.versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "shape": shape,
        "rows": rows,
    }


def _trainer(precision: Precision, data: PreparedDataset, batch: int, world: World) -> Trainer:
    return Trainer(
        bench_config(precision=precision, batch_size=batch), tables_of(data.pipeline), fields_of(data.pipeline), world
    )


def _stream(data: PreparedDataset, batch: int, kind: str) -> Generator[Batch, None, None]:
    """Endless batches."""
    loader = BatchLoader(data.files("train"), data.pipeline, batch_size=batch, shuffle_seed=1)
    if kind == "cuda":
        yield from cycle(list(islice(loader.epoch(0), IN_MEMORY)))
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def _speeds(
    trainers: Mapping[Precision, Trainer],
    streams: Mapping[Precision, Iterator[Batch]],
    batch: int,
    turns: int,
    world: World,
) -> list[dict[str, Any]]:
    found: dict[Precision, list[float]] = {precision: [] for precision in trainers}
    for turn in range(turns + 1):
        for precision, trainer in trainers.items():
            set_precision(precision, world.device)
            _wait(world.device)
            started = time.perf_counter()
            for _ in range(STEPS):
                trainer.step(streams[precision])
            _wait(world.device)
            if turn:  # the first one warms up
                found[precision].append(STEPS * batch / (time.perf_counter() - started))
    return [_row(f"training, {precision}", speeds, "samples/s") for precision, speeds in found.items()]


def _profile(
    precision: Precision,
    trainer: Trainer,
    stream: Iterator[Batch],
    shape: dict[str, int],
    world: World,
    copied: float,
    steps: int,
) -> list[dict[str, Any]]:
    """Rows of stages, of the rate of products and of what is reached of it."""
    set_precision(precision, world.device)
    stages = Stages(trainer, world.device)
    table = [stages.step(stream) for _ in range(steps)]
    totals = np.array([sum(step.values()) for step in table])
    median = float(np.median(totals))
    rows = [_row(f"step, {precision}", list(totals), "ms")]
    for stage in STAGES:
        times = [step[stage] for step in table]
        rows.append({**_row(f"{stage}, {precision}", times, "ms"), "share": float(np.median(times)) / median})
    rate = _gemm_rate(precision, world.device)
    rows.append(_row(f"gemm, {precision}", [rate / 1e9], "GFLOP/s"))
    products_ms = 1e3 * shape["batch"] * flops(trainer.model.network) / rate
    dense = np.array([step[DENSE] + step[BACKWARD] for step in table])
    rows.append(_row(f"dense share of gemm, {precision}", list(products_ms / dense), "1"))
    moved_ms = 1e3 * _bytes(trainer, shape) / copied
    rows.append(_row(f"share of roofline, {precision}", list((products_ms + moved_ms) / totals), "1"))
    return rows


def flops(network: nn.Module) -> int:
    """Of all products for one sample, forward and backward."""
    return 6 * sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Linear))


def _bytes(trainer: Trainer, shape: dict[str, int]) -> int:
    """Of a step's embeddings and gradients: read, gradient written and read, read and written by the update."""
    return 5 * 4 * shape["batch"] * shape["fields"] * trainer.config.model.embedding_dim


def _gemm_rate(precision: Precision, device: torch.device) -> float:
    """FLOP/s of a large product as training does it, the fastest of several."""
    width, dtype = WIDTH[device.type], torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))

    def product() -> None:
        with torch.no_grad(), computing(precision, device.type):
            linear(left, right, None)

    return float(2 * width**3 / _fastest(product, device))


def _copy_rate(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes, the fastest of several."""
    source = torch.ones(COPIED, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds."""
    return min(HostClock(device).times({"it": call}, 12)["it"][2:]) / 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(name: str, samples: list[float], unit: str) -> dict[str, Any]:
    return {"name": name, **quantiles(samples), "unit": unit, "runs": len(samples)}
