"""Every kernel compiles for GPUs that are not here, keeps its tiles in registers, and reads as widely as rows allow."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
TARGETS = ("80", "90", "100")
KERNELS = ("embedding_norm_mask", "hidden_norm_act", "power_norm_act", "mask_project", "block_gemm")
# bytes of shared memory that a program may take: of the smallest GPU with the architecture's machine code
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
BYTES = {"torch.float32": 4, "torch.bfloat16": 2, "torch.float16": 2}

Report = list[dict[str, Any]]


def compile_kernels(cache: Path, *arguments: str) -> Report:
    """What tests/masknet/kernels/aot.py prints, from a process in which nothing is interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.masknet.kernels.aot", "--targets", *TARGETS, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return compile_kernels(tmp_path_factory.mktemp("triton"))


def name_of(entry: dict[str, Any]) -> str:
    return f"{entry['kernel']} sm_{entry['target']} {entry['case']}"


def width_of(entry: dict[str, Any]) -> int:
    return int(entry["case"]["width"])


def spilling(report: Report) -> dict[str, int]:
    """Kernels that keep registers on the stack, with the bytes; rows wider than 512 may."""
    spilled = {name_of(entry): entry["stack"] + entry["local"] for entry in report if width_of(entry) <= 512}
    return {name: size for name, size in spilled.items() if size}


def too_large(report: Report) -> dict[str, int]:
    """Kernels that take more shared memory than there is."""
    return {name_of(entry): entry["shared"] for entry in report if entry["shared"] > SHARED[entry["target"]]}


def narrow(report: Report) -> dict[str, dict[str, int]]:
    """Kernels of rows at multiples of 16 bytes that have no load of 8 bytes or more."""
    return {
        name_of(entry): entry["loads"]
        for entry in report
        if width_of(entry) * BYTES[entry["case"]["dtype"]] % 16 == 0
        and not any(int(width) >= 8 for width in entry["loads"])
    }


def test_every_operator_compiles_for_every_architecture(report: Report) -> None:
    compiled = {(entry["op"], entry["target"]) for entry in report}
    assert compiled == {(kernel, int(target)) for kernel in KERNELS for target in TARGETS}
    forward_and_backward = {entry["kernel"] for entry in report if entry["op"] == "embedding_norm_mask"}
    assert len(forward_and_backward) == 2


def test_tiles_stay_in_registers(report: Report) -> None:
    assert spilling(report) == {}


def test_shared_memory_suffices(report: Report) -> None:
    assert too_large(report) == {}


def test_aligned_rows_are_read_8_bytes_at_a_time_or_more(report: Report) -> None:
    assert narrow(report) == {}


def test_relu_passes_nan_on(report: Report) -> None:
    """numpy's maximum, in the interpreter, does so anyway."""
    ops = ("block_gemm", "hidden_norm_act", "power_norm_act")
    with_relu = [entry for entry in report if entry["op"] in ops and "backward" not in entry["kernel"]]
    assert {entry["op"] for entry in with_relu} == set(ops)
    assert all("max.NaN.f32" in entry["maxima"] for entry in with_relu)


def test_products_run_on_tensor_cores_but_for_fp32_in_full(report: Report) -> None:
    for entry in report:
        if entry["op"] in ("mask_project", "block_gemm"):
            full = entry["case"]["dtype"] == "torch.float32" and entry["case"]["precision"] == "highest"
            assert bool(entry["products"]) != full, name_of(entry)


def test_many_rows_use_the_products_of_hopper(report: Report) -> None:
    many = [
        entry
        for entry in report
        if entry["op"] == "block_gemm"
        and (entry["target"], entry["case"]["rows"], entry["case"]["dtype"]) == (90, "4096", "torch.bfloat16")
    ]
    assert many
    assert all("wgmma.mma_async" in entry["products"] for entry in many)


@pytest.mark.long
@pytest.mark.parametrize("kernel", KERNELS)
def test_all_cases_on_all_architectures(kernel: str, tmp_path: Path) -> None:
    report = compile_kernels(tmp_path, "--kernels", kernel, "--thorough")
    assert report
    assert spilling(report) == {}
    assert too_large(report) == {}
    assert narrow(report) == {}
