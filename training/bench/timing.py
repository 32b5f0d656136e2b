"""Times of rivals that take turns in one run, so that what else the machine does falls on all of them alike."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

Call = Callable[[], object]
WARM_UPS = 3  # calls before a measurement, in which kernels are compiled and libraries choose algorithms
FLUSH_BYTES = 256 * 2**20  # several times the largest L2 cache


class Clock(Protocol):
    """Times calls."""

    name: str

    def times(self, calls: Mapping[str, Call], runs: int) -> dict[str, list[float]]:
        """Milliseconds of each call, run by run."""
        ...


def in_turns(names: Sequence[str], runs: int) -> Iterator[str]:
    """Every name once a run, each run with another one first."""
    for run in range(runs):
        first = run % len(names)
        yield from (*names[first:], *names[:first])


class HostClock:
    """From a call to the end of its work on the device, launches included: what a caller waits for."""

    name = "host"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def times(self, calls: Mapping[str, Call], runs: int) -> dict[str, list[float]]:
        """Milliseconds of each call, run by run."""
        found: dict[str, list[float]] = {name: [] for name in calls}
        for name in in_turns(list(calls), runs):
            self._wait()
            started = time.perf_counter()
            calls[name]()
            self._wait()
            found[name].append(1e3 * (time.perf_counter() - started))
        return found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class DeviceClock:
    """A GPU's own time: launches are replayed from a CUDA graph, between events, after L2 was overwritten.

    A replay takes a few microseconds before its first launch; `floor` says how many.
    """

    name = "device"

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def times(self, calls: Mapping[str, Call], runs: int) -> dict[str, list[float]]:
        """Milliseconds of each call, run by run."""
        graphs = {name: captured(call) for name, call in calls.items()}
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
        for name in in_turns(list(calls), runs):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self.flush.zero_()
            start.record()
            graphs[name].replay()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
        return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """What the call launches, as a graph."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def copy_bandwidth(clock: DeviceClock, runs: int) -> float:
    """Bytes per second of a copy from the device's memory to itself, read and written ones, at the median."""
    source = torch.ones(4 * FLUSH_BYTES, dtype=torch.int8, device=clock.flush.device)
    target = torch.empty_like(source)
    milliseconds = clock.times({"copy": lambda: target.copy_(source)}, runs)["copy"]
    return float(2e3 * source.nbytes / np.median(milliseconds))


def floor(clock: DeviceClock, runs: int) -> float:
    """Milliseconds of a launch that has nothing to do, at the median: no row can be below it."""
    entry = torch.zeros(1, device=clock.flush.device)
    return float(np.median(clock.times({"nothing": entry.zero_}, runs)["nothing"]))


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, to four digits."""
    return {f"p{q}": float(f"{np.percentile(samples, q):.4g}") for q in (20, 50, 80)}
