"""Times of the kernels and of whole networks, and of what else could do their work.

    python -m training.bench.kernels [--out FILE] [--quick] [--only NAME ...]

The same as `masknet bench kernels`; this way it needs torch, triton, numpy and pydantic alone. On CUDA a full run
compiles hundreds of functions by torch.compile and takes long: --only measures one part at a time. A result's rows have
the 20th, 50th and 80th percentile of a rival's times; `ratio` is the baseline's median over its own, so that above 1 is
faster than the baseline, and `faster_share` the share of turns in which it was. How times are taken is said in
`timing`, what is compared in the modules of the parts.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from features.errors import InputError
from training.bench import machine, report
from training.bench.comparing import Bench, Case
from training.bench.eager_norms import eager_norm_cases
from training.bench.gemms import gemm_cases, measured_gemms
from training.bench.networks import folding_cases, serving_cases, training_cases
from training.bench.power_kernels import power_cases
from training.bench.row_kernels import embedding_cases, hidden_cases

Part = Callable[[torch.device, bool], Iterator[Case]]
RUNS = {False: 100, True: 5}  # by `quick`
ON_CUDA: dict[str, Part] = {
    "embedding_norm_mask": embedding_cases,
    "hidden_norm_act": hidden_cases,
    "power_norm_act": power_cases,
    "maskblock_gemm": gemm_cases,
    "training": training_cases,
    "serving": serving_cases,
}
ON_CPU: dict[str, Part] = {"norms": eager_norm_cases, "folding": folding_cases}
PARTS = (*ON_CUDA, *ON_CPU)


def run_kernels(out: Path | None, quick: bool, only: Sequence[str] = ()) -> None:
    """Measure, show, and write to `out`.

    Raises:
        InputError: `out` cannot be written, or there is no such part.
    """
    unknown = [name for name in only if name not in PARTS]
    if unknown:
        raise InputError(f"--only {unknown[0]}: the parts are {', '.join(PARTS)}")
    if out is not None:
        report.check_writable(out)
    result = measure(quick, only or PARTS)
    report.show(result)
    if out is not None:
        report.write(out, result)
        print(f"written: {out}")


def measure(quick: bool, only: Sequence[str]) -> dict[str, Any]:
    """The result, on the GPU if there is one."""
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    torch.manual_seed(0)
    bench = Bench(device, RUNS[quick])
    here, elsewhere = (ON_CUDA, ON_CPU) if on_cuda else (ON_CPU, ON_CUDA)
    for name in elsewhere:
        if name in only:
            bench.skip(name, "it is for machines without CUDA" if on_cuda else "no CUDA device")
    cases = [case for name, part in here.items() if name in only for case in part(device, quick)]
    with report.progress(len(cases)) as started:
        for done, case in enumerate(cases):
            started(done, case.name)
            bench.run(case)
    result: dict[str, Any] = {
        "device": machine.facts(),
        "versions": machine.versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "rows": bench.rows,
        "skipped": bench.skipped,
    }
    if on_cuda:
        result["copy_gb_per_second"] = round(bench.copy_bytes_per_second / 1e9, 1)
        result["floor_ms"] = float(f"{bench.floor_ms:.4g}")
        if "maskblock_gemm" in only:
            result["measured_gemms"] = measured_gemms(bench.rows, torch.cuda.get_device_capability(device))
    return result


def main() -> None:
    """The command without the command line's libraries: exit codes are the same, but for a wrong MASKNET_KERNELS."""
    parser = argparse.ArgumentParser(description="Times of the kernels, and of what else could do their work.")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    parser.add_argument("--quick", action="store_true", help="few runs of small sizes")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help=f"one of {', '.join(PARTS)}")
    options = parser.parse_args()
    try:
        run_kernels(options.out, options.quick, options.only)
    except InputError as error:
        sys.exit(_told(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(_told("interrupted", 130))


def _told(message: str, code: int) -> int:
    print(f"masknet: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
