"""A case of the benchmark, its rivals, and the rows that come of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from training.bench.timing import WARM_UPS, Call, Clock, DeviceClock, HostClock, copy_bandwidth, floor, quantiles

# How far rivals may be from the baseline: ‖difference‖ / ‖baseline's‖ of each output. TF32's products are 3e-4 off.
TOLERANCES = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
Rivals = dict[str, Call | str]  # what to time by rival's name, or why it cannot be


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        name: what is compared.
        facts: sizes and kinds, for the result.
        rivals: makes inputs and rivals when the case's turn comes. A call returns its outputs, which must be close to
            the baseline's.
        dtype: of the inputs or, with autocast, of the products.
        baseline: the rival that ratios are to.
        moved: the bytes that have to be read and written.
        host: whether launches count (`HostClock`).
    """

    name: str
    facts: dict[str, Any]
    rivals: Callable[[], Rivals]
    dtype: torch.dtype = torch.float32
    baseline: str = "eager"
    moved: int = 0
    host: bool = False


@dataclass
class Bench:
    """Runs cases on one device and keeps their rows."""

    device: torch.device
    runs: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    copy_bytes_per_second: float = 0.0
    floor_ms: float = 0.0

    def __post_init__(self) -> None:
        self.clocks: dict[bool, Clock] = dict.fromkeys((False, True), HostClock(self.device))  # by `host`
        self.l2_bytes = 0
        if self.device.type == "cuda":
            clock = self.clocks[False] = DeviceClock(self.device)
            self.l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
            self.copy_bytes_per_second = copy_bandwidth(clock, self.runs)
            self.floor_ms = floor(clock, self.runs)

    def run(self, case: Case) -> None:
        """Time a case's rivals, and write down who is left out and why."""
        clock = self.clocks[case.host]
        calls = self._sound(case, clock)
        if case.baseline not in calls:
            return
        times = clock.times(calls, self.runs)
        base = quantiles(times[case.baseline])["p50"]
        for rival, samples in times.items():
            row = {"name": case.name, **case.facts, "dtype": _name(case.dtype), "rival": rival, **quantiles(samples)}
            row |= {"unit": "ms", "runs": len(samples), "clock": clock.name, "baseline": case.baseline}
            row["ratio"] = float(f"{base / row['p50']:.4g}")
            if rival != case.baseline:
                faster = sum(map(float.__lt__, samples, times[case.baseline]))
                row["faster_share"] = round(faster / len(samples), 3)
            self.rows.append(row | self._traffic(case, row["p50"]))

    def skip(self, name: str, reason: str, **facts: Any) -> None:
        """Write down what was left out."""
        entry = {"name": name, **facts, "reason": reason}
        if entry not in self.skipped:
            self.skipped.append(entry)

    def _sound(self, case: Case, clock: Clock) -> dict[str, Call]:
        """The rivals that run and whose outputs are the baseline's."""
        calls: dict[str, Call] = {}
        expected: list[torch.Tensor] = []
        for rival, call in sorted(case.rivals().items(), key=lambda item: item[0] != case.baseline):
            if isinstance(call, str):
                self.skip(case.name, call, rival=rival)
                continue
            facts = {**case.facts, "dtype": _name(case.dtype), "rival": rival}
            try:
                for _ in range(WARM_UPS):
                    call()
                outputs = list(tensors(call()))
                expected = expected or outputs
                away = [distance(*pair) for pair in zip(outputs, expected, strict=True)]
                clock.times({rival: call}, 1)  # what waits for the device cannot be captured in a graph
            except Exception as error:  # other libraries' errors may be of any type
                self.skip(case.name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", **facts)
                continue
            if all(each <= TOLERANCES[case.dtype] for each in away):  # NaN never is
                calls[rival] = call
            else:
                self.skip(case.name, f"differs from {case.baseline}: {', '.join(f'{x:.2g}' for x in away)}", **facts)
        return calls

    def _traffic(self, case: Case, milliseconds: float) -> dict[str, Any]:
        """What the bytes moved say, where they are known; no share of a copy's rate where the cache is at work."""
        if not (case.moved and self.copy_bytes_per_second):
            return {}
        rate = case.moved / milliseconds * 1e3
        fits = case.moved <= self.l2_bytes
        share = None if fits else round(rate / self.copy_bytes_per_second, 3)
        return {"bytes": case.moved, "gb_per_second": round(rate / 1e9, 1), "fits_l2": fits, "copy_share": share}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensors(output: object) -> Iterator[torch.Tensor]:
    """The tensors with entries among a call's results."""
    if isinstance(output, torch.Tensor):
        yield from [output.detach()] if output.numel() else []
    elif isinstance(output, Sequence):
        for each in output:
            yield from tensors(each)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in fp64; of an expected 0, got's norm."""
    expected = expected.double()
    error, norm = (got.double() - expected).norm().item(), expected.norm().item()
    return error / norm if norm else error
