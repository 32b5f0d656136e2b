"""Compiles the kernels ahead of time for GPUs that need not be here, and says what came out, one JSON line each.

    python -m tests.masknet.kernels.aot --kernels block_gemm --targets 80 90 100 [--thorough]

The operators themselves run, on CPU tensors, with every launch turned into a compilation: what is compiled, with its
argument types, alignments, constants and warps, is what a launch with such tensors takes. Must be run in a process
without TRITON_INTERPRET, which decides when the kernels are decorated. Without --thorough each case is compiled for one
of the targets, in turn.

registers, stack and local are `cuobjdump -res-usage` of the cubin. Registers are spilled to the stack, so that a stack
of 0 bytes says that none was. loads counts the global loads of the PTX by their width in bytes, products its matrix
instructions, maxima those that pass NaN on and those that do not.
"""

import argparse
import json
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.masknet.kernels.aot_cases import CASES, Case

# ld.global.L1::evict_last.v4.b32 {…} and cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r3
LOAD = re.compile(r"\bld\.global(?:\.[A-Za-z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bfus](\d+)\b")
ASYNC_COPY = re.compile(r"cp\.async\.\w+\.shared\.global *\[[^\]]*\], *\[[^\]]*\], *(0x[0-9a-f]+|\d+)")
MAXIMUM = re.compile(r"\bmax(?:\.NaN)?\.f32\b")
PRODUCT = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
USAGE = {"registers": "REG", "stack": "STACK", "local": "LOCAL"}


class AbsentGpu:
    """A driver that names a GPU to compile for; there is nothing to launch on."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        """The GPU to compile for."""
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        """The number under which compiled kernels are kept: one for each architecture."""
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        """No stream."""
        return 0


def load_widths(ptx: str) -> dict[int, int]:
    """How many global loads there are of each width in bytes."""
    widths = [int(vector or 1) * int(bits) // 8 for vector, bits in LOAD.findall(ptx)]
    widths += [int(size, 0) for size in ASYNC_COPY.findall(ptx)]
    return dict(sorted(Counter(widths).items()))


def usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, bytes of its stack and of its other local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.findall(rf"\b{short}:(\d+)", told)[0]) for name, short in USAGE.items()}


def describe(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel is and takes."""
    types = kernel.src.signature
    names = list(types)
    return {
        "kernel": kernel.src.name,
        "target": kernel.metadata.target.arch,
        "signature": {name: type_ for name, type_ in types.items() if type_ != "constexpr"},
        "constants": {names[path[0]]: value for path, value in kernel.src.constants.items()},
        "warps": kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        **usage(kernel.asm["cubin"]),
        "loads": load_widths(kernel.asm["ptx"]),
        "maxima": dict(Counter(MAXIMUM.findall(kernel.asm["ptx"]))),
        "products": dict(Counter(PRODUCT.findall(kernel.asm["ptx"]))),
    }


def compiled(case: Case, architecture: int) -> Iterator[dict[str, Any]]:
    """The kernels that the case launches, for one GPU."""
    run, kernels = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        started = time.perf_counter()
        kernels.append((run(self, *args, grid=grid, warmup=True, **kwargs), time.perf_counter() - started))

    JITFunction.run = compile_only
    driver.set_active(AbsentGpu(architecture))
    try:
        case.call()
    finally:
        JITFunction.run = run
    for kernel, seconds in kernels:
        yield {"op": case.op, "case": case.labels, **describe(kernel), "seconds": round(seconds, 2)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compile the kernels for GPUs that need not be here.")
    parser.add_argument("--kernels", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--targets", nargs="+", type=int, default=[80, 90, 100])
    parser.add_argument("--thorough", action="store_true", help="more cases, each for every target")
    arguments = parser.parse_args()
    for op in arguments.kernels:
        cases = CASES[op](arguments.thorough)
        pairs = product(cases, arguments.targets) if arguments.thorough else zip(cases, cycle(arguments.targets))
        for case, architecture in pairs:
            for line in compiled(case, architecture):
                print(json.dumps(line, default=str), flush=True)


if __name__ == "__main__":
    main()
