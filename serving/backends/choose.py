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
from serving.backends.record import BACKENDS_FILE, Backends, Fast


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
        kind: exact, or the fastest that has passed the bundle's check and runs here.
        device: where to.
        threads: of a CPU's products; by default as torch has it.
        allowed: the bundle's.
        member: the network's place in the bundle.

    Raises:
        InputError: fast, and no backend that runs here has passed; the message says why.
    """
    device = torch.device(device)
    if device.type == "cpu":
        keep_freed_memory()
        if kind == "exact":
            return CPUBackend("fp32", network, threads)
    elif kind == "exact":
        return GPUBackend("fp32", network, device, torch.float32)
    name, record = chosen(device, allowed)
    bound = record.record.backends[name].largest_difference or 0.0
    if device.type != "cpu":
        return GPUBackend(name, network, device, torch.bfloat16, bound)
    ranges = record.ranges[member] if record.ranges else {}
    return CPUBackend(name, fast_network(name, network, ranges), threads, bound)


def chosen(device: torch.device, allowed: Backends | None) -> tuple[Fast, Backends]:
    """The name of the fastest that may be taken, and the record; InputError as `make_backend`."""
    if allowed is None:
        raise InputError(
            f"backend fast: the bundle has no {BACKENDS_FILE}, which training writes since fast backends are checked; "
            "take backend exact, or train the model anew"
        )
    reasons = []
    for name in FASTEST_FIRST:
        verdict = allowed.record.backends.get(name)
        if verdict is None:
            reasons.append(f"{name}: not checked")
        elif not verdict.passed:
            reasons.append(f"{name}: {verdict.reason}")
        elif device.type == "cpu" and (lacks := lacking(name)) is not None:
            reasons.append(f"{name}: {lacks}")
        elif device.type != "cpu" and name != "bf16":
            reasons.append(f"{name}: is a CPU's")
        else:
            return name, allowed
    raise InputError(f"backend fast: none may be taken ({'; '.join(reasons)}); take backend exact")
