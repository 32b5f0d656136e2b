"""The fast backends of each kind of device, and what they need of it."""

from collections.abc import Mapping
from importlib.metadata import version

import torch

from masknet.folding import ServingNetwork
from serving.backends import bf16, int8
from serving.backends.base import Network
from serving.backends.bf16 import HalfNetwork
from serving.backends.gpu import GPUBackend
from serving.backends.int8 import Int8Network
from serving.backends.ranges import Ranges
from serving.backends.record import Device, Fast

# of a CPU: tests/benchmarks/results/backends.json
FASTEST_FIRST: Mapping[Device, tuple[Fast, ...]] = {"cpu": ("int8", "mixed", "bf16"), "cuda": ("bf16",)}


def at_hand() -> tuple[Device, ...]:
    """The kinds of device that this machine has."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def lacking(name: Fast, device: Device = "cpu") -> str | None:
    """What this machine lacks for a backend; None if nothing."""
    if device == "cuda":
        return None if "cuda" in at_hand() else "there is no GPU that torch can use"
    if name != "bf16" and not int8.runs_here():
        return "this CPU has no AVX-512 VNNI"
    return "this CPU has no AVX-512 BF16" if name != "int8" and not bf16.runs_here() else None


def fast_network(name: Fast, network: ServingNetwork, ranges: Ranges, device: Device = "cpu") -> Network:
    """A folded network by a fast backend, which takes and gives tensors on the CPU; `ranges` are int8's and mixed's."""
    if device == "cuda":
        backend = GPUBackend(name, network, torch.device(device), torch.bfloat16)
        return lambda context_1C, candidates_NR: backend.logits(context_1C, candidates_NR).cpu()
    return HalfNetwork(network) if name == "bf16" else Int8Network(network, ranges, mixed=name == "mixed")


def versions(device: Device) -> dict[str, str]:
    """What a check's outcome may depend on."""
    what = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"torch": version("torch"), device: what}
