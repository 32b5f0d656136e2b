"""Which backend serves a network.

On a CPU exact is the folded network as it is: oneDNN's fp32 products. `tests/benchmarks/backends.py` has measured it
beside ONNX Runtime and torch's compilers.
"""

import torch

from features.allocator import keep_freed_memory
from features.errors import InputError
from masknet.folding import ServingNetwork
from serving.backends.base import Backend, CPUBackend, Kind
from serving.backends.fast import FASTEST_FIRST, fast_network, lacking
from serving.backends.gpu import GPUBackend
from serving.backends.record import BACKENDS_FILE, Backends, Device, Fast, Verdict


def make_backend(
    network: ServingNetwork,
    kind: Kind,
    device: torch.device | str,
    threads: int | None,
    allowed: Backends | None,
    *,
    member: int = 0,
) -> Backend:
    """The backend of one member.

    Args:
        network: folded, with or without a context; it is left as it is.
        kind: exact, or the fastest that has passed the bundle's check on such a device and runs here.
        device: where to.
        threads: of a CPU's products; by default as torch has it.
        allowed: the bundle's.
        member: the network's place in the bundle.

    Raises:
        InputError: fast, and no backend that runs there has passed; the message says why.
    """
    device = torch.device(device)
    if device.type == "cpu":
        keep_freed_memory()
        if kind == "exact":
            return CPUBackend("fp32", network, threads)
    elif kind == "exact":
        return GPUBackend("fp32", network, device, torch.float32)
    on = kind_of(device)
    name, verdict = chosen(on, allowed)
    bound = verdict.largest_difference or 0.0
    if on == "cuda":
        return GPUBackend(name, network, device, torch.bfloat16, bound)
    ranges = allowed.ranges[member] if allowed is not None and allowed.ranges else {}
    return CPUBackend(name, fast_network(name, network, ranges), threads, bound)


def kind_of(device: torch.device | str) -> Device:
    """Which of the kinds that are checked a device is."""
    return "cpu" if torch.device(device).type == "cpu" else "cuda"


def chosen(device: Device, allowed: Backends | None) -> tuple[Fast, Verdict]:
    """The fastest that may be taken, and what was found of it; InputError as `make_backend`."""
    record = None if allowed is None else allowed.devices.get(device)
    if record is None:
        raise InputError(
            f"backend fast: the bundle's {BACKENDS_FILE} has no check on {device}; on a machine with one run python -m "
            "training.backends MODEL --data DIR --out BUNDLE and serve BUNDLE, or train there; or take backend exact"
        )
    reasons = []
    for name in FASTEST_FIRST[device]:
        verdict = record.backends.get(name)
        if verdict is None:
            reasons.append(f"{name}: not checked")
        elif not verdict.passed:
            reasons.append(f"{name}: {verdict.reason}")
        elif (lacks := lacking(name, device)) is not None:
            reasons.append(f"{name}: {lacks}")
        else:
            return name, verdict
    raise InputError(f"backend fast: none may be taken on {device} ({'; '.join(reasons)}); take backend exact")
