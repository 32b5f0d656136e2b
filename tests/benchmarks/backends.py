"""Backends of a folded network on a CPU, beside the network as trained, ONNX Runtime's and torch's compilers, in turns.

    python -m tests.benchmarks.backends

39 fields × 10, of which 20 are the context's, 3 parallel blocks × 400, r = 2, head 400, random weights. Rows have the
time of a forward pass, how far logits are from exact's, as a share of their deviation, and the most that a row's
probability moves with its batch (500 rows, 10 × 50 and 500 × 1).

Legend: N candidates, C width of the context's embeddings, R of a candidate's.
"""

import argparse
import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import nn
from torch._inductor import config as inductor_config

from features.allocator import keep_freed_memory
from masknet.folding import ServingNetwork, fold
from serving.backends.bf16 import HalfNetwork
from serving.backends.int8 import Int8Network
from serving.backends.ranges import Observer
from tests.benchmarks.common import run_module, write_result
from training.bench.networks import CONTEXT_FIELDS, D_FIELD, network_of
from training.bench.row_kernels import F
from training.bench.timing import WARM_UPS, Call, HostClock, quantiles

CANDIDATES, THREADS, RUNS = (1, 50, 500, 2000), (1, 2), 60
C, R = D_FIELD * len(CONTEXT_FIELDS), D_FIELD * (F - len(CONTEXT_FIELDS))
BASELINE = "fp32, folded"
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def requests(rows: int, count: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Contexts [1, C] with candidates [N, R]."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(1, C, generator=generator), torch.randn(rows, R, generator=generator)


def rivals(folder: Path, threads: int) -> dict[str, Forward]:
    """Every way to compute the network."""
    torch.manual_seed(0)
    network = network_of("parallel").eval()
    folded, observer = fold(network, CONTEXT_FIELDS), Observer(fold(network))
    for context_1C, candidates_NR in requests(64, 128, seed=1):
        observer(context_1C[:, :0], torch.cat([context_1C.expand(64, -1), candidates_NR], 1))
    ranges, half = observer.ranges(), fold(copy.deepcopy(network).bfloat16(), CONTEXT_FIELDS)
    found: dict[str, Forward] = {
        BASELINE: folded,
        "fp32, as trained": as_trained(network),
        "bf16": HalfNetwork(folded),
        "mixed": Int8Network(folded, ranges, mixed=True),
        "int8": Int8Network(folded, ranges),
        "fp32, torch.compile": compiled(folded),
        "bf16, torch.compile": in_bf16(compiled(half)),
        "fp32, AOTInductor": packaged(folded, folder / "fp32.pt2", torch.float32),
        "bf16, AOTInductor": in_bf16(packaged(half, folder / "bf16.pt2", torch.bfloat16)),
    }
    exported, quantized = folder / "fp32.onnx", folder / "int8.onnx"
    export(folded, exported)
    quantize(exported, quantized)
    return found | {
        "fp32, ONNX Runtime": session(exported, threads),
        "int8 (static), ONNX Runtime": session(quantized, threads),
    }


def as_trained(network: nn.Module) -> Forward:
    """The network before it is folded, which reads a context per candidate."""

    def forward(context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
        emb_ND = torch.cat([context_1C.expand(len(candidates_NR), -1), candidates_NR], 1)
        out: torch.Tensor = network(emb_ND.view(-1, F, D_FIELD))
        return out

    return forward


def compiled(folded: ServingNetwork) -> Forward:
    """By Inductor with constant weights and any number of rows."""
    program = torch.compile(folded, fullgraph=True, dynamic=True)

    def forward(context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
        with inductor_config.patch(freezing=True), torch.no_grad():
            out: torch.Tensor = program(context_1C, candidates_NR)
        return out

    return forward


def packaged(folded: ServingNetwork, path: Path, dtype: torch.dtype) -> Forward:
    """`compiled` ahead of time, to a library that is called without Python."""
    context_1C, candidates_NR = next(requests(64, 1, seed=2))
    shapes = (None, {0: torch.export.Dim("N", min=2)})  # it takes one row all the same
    with inductor_config.patch(freezing=True), torch.no_grad(), torch.inference_mode(False):
        example = (context_1C.to(dtype, copy=True), candidates_NR.to(dtype, copy=True))
        program = torch.export.export(folded, example, dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return torch._inductor.aoti_load_package(str(path))


def in_bf16(program: Forward) -> Forward:
    """Of a network in bf16, for inputs and outputs in fp32."""
    return lambda context_1C, candidates_NR: program(context_1C.bfloat16(), candidates_NR.bfloat16()).float()


def export(folded: ServingNetwork, path: Path) -> None:
    """As ONNX with any number of candidates."""
    example = next(requests(64, 1, seed=2))
    shapes = {"context_1C": None, "candidates_NR": {0: torch.export.Dim("N", min=2)}}
    with torch.no_grad():
        program = torch.onnx.export(
            folded, example, dynamo=True, dynamic_shapes=shapes, input_names=["context", "candidates"], verbose=False
        )
    assert program is not None
    program.save(path)


def quantize(exported: Path, path: Path) -> None:
    """Static int8: weights of eight signed bits by channel, bounds from rows of data."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.requests = requests(64, 128, seed=1)

        def get_next(self) -> dict[str, Any] | None:
            request = next(self.requests, None)
            return request and {"context": request[0].numpy(), "candidates": request[1].numpy()}

    quantize_static(
        exported,
        path,
        Reader(),
        quant_format=QuantFormat.QOperator,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def session(path: Path, threads: int) -> Forward:
    """By ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    run = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run

    def forward(context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
        given = {"context": context_1C.numpy(), "candidates": candidates_NR.numpy()}
        return torch.from_numpy(run(None, given)[0])

    return forward


def quality(forward: Forward, exact: Forward) -> dict[str, float]:
    """The error of the logits over their deviation, and the movement of probabilities with the batch."""
    pairs = [(forward(*each), exact(*each)) for each in requests(500, 8, seed=3)]
    found_N, expected_N = (torch.cat(each) for each in zip(*pairs, strict=True))
    error = float((found_N - expected_N).square().mean().sqrt() / expected_N.std())
    context_1C, candidates_NR = next(requests(500, 1, seed=4))
    whole_N = forward(context_1C, candidates_NR).sigmoid()
    moved = 0.0
    for size in (50, 1):
        parts = [forward(context_1C, part) for part in torch.split(candidates_NR, size)]
        moved = max(moved, float((torch.cat(parts).sigmoid() - whole_N).abs().max()))
    return {"error": float(f"{error:.3g}"), "batch_difference": float(f"{moved:.2g}")}


@torch.inference_mode()
def once(threads: int) -> list[dict[str, Any]]:
    """Rows of one number of threads."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        forwards = rivals(Path(folder), threads)
        facts = {name: quality(each, forwards[BASELINE]) for name, each in forwards.items()}
        for N in CANDIDATES:
            request = next(requests(N, 1, seed=5))
            calls: dict[str, Call] = {name: partial(each, *request) for name, each in forwards.items()}
            for call in calls.values():
                for _ in range(WARM_UPS):
                    call()
            times = HostClock(torch.device("cpu")).times(calls, RUNS)
            base = quantiles(times[BASELINE])["p50"]
            for name, samples in times.items():
                found = quantiles(samples)
                row = {"name": name, "candidates": N, "threads": threads, **found, "unit": "ms", "runs": RUNS}
                rows.append({**row, "ratio": round(base / found["p50"], 2), **facts[name]})
    return rows


def main() -> None:
    """Write results/backends.json: a process for each number of threads."""
    parser = argparse.ArgumentParser(description="Times of backends.")
    parser.add_argument("--once", type=int, help="print the rows of so many threads as JSON")
    options = parser.parse_args()
    if options.once:
        warnings.simplefilter("ignore")
        print(json.dumps({"rows": once(options.once)}))
        return
    rows = [row for threads in THREADS for row in run_module("backends", "--once", threads)["rows"]]
    write_result("backends", {"rows": rows})


if __name__ == "__main__":
    main()
