"""The fast backends, and what they need of a CPU."""

from typing import get_args

from masknet.folding import ServingNetwork
from serving.backends import bf16, int8
from serving.backends.base import Network
from serving.backends.bf16 import HalfNetwork
from serving.backends.int8 import Int8Network
from serving.backends.ranges import Ranges
from serving.backends.record import Fast

FASTEST_FIRST: tuple[Fast, ...] = get_args(Fast)  # tests/benchmarks/results/backends.json


def lacking(name: Fast) -> str | None:
    """What this CPU lacks for a backend; None if nothing."""
    if name == "int8":
        return None if int8.runs_here() else "this CPU has no AVX-512 VNNI"
    return None if bf16.runs_here() else "this CPU has no AVX-512 BF16"


def fast_network(name: Fast, network: ServingNetwork, ranges: Ranges) -> Network:
    """A folded network by a fast backend; `ranges` are int8's."""
    return Int8Network(network, ranges) if name == "int8" else HalfNetwork(network)
