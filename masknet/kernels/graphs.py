"""CUDA graphs of a ranking network: the launches of a whole request replayed as one.

With a few hundred candidates a request's launches take longer than its work. A graph's shapes are fixed: there is one
graph for each of a few numbers of rows, and a request takes the smallest that has room for it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
WARM_UPS = 3  # calls before a capture, in which libraries choose algorithms and kernels are compiled


def size_for(rows: int, sizes: tuple[int, ...]) -> int | None:
    """The smallest of `sizes` with room for `rows`; None where there is none."""
    return min((size for size in sizes if size >= rows), default=None)


class StaticInputs:
    """Buffers that every graph reads, with the graphs that read the first rows of them."""

    def __init__(self, network: Network, rows: int, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> None:
        self.network = network
        with torch.inference_mode(False):  # inference tensors could not be written to outside that mode
            self.context_1C = context_1C.new_zeros(1, context_1C.shape[-1])
            self.candidates_SR = candidates_NR.new_zeros(rows, candidates_NR.shape[-1])
        self.cuda = candidates_NR.is_cuda
        self.pool = torch.cuda.graph_pool_handle() if self.cuda else None  # shared: one graph runs at a time
        self.done = torch.cuda.Event() if self.cuda else None  # type: ignore[no-untyped-call]
        self.replays: dict[int, Callable[[], torch.Tensor]] = {}

    def check(self, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> None:
        """ValueError where a request's tensors are not of the buffers' kind."""
        for name, x, buffer in (
            ("context", context_1C, self.context_1C),
            ("candidates", candidates_NR, self.candidates_SR),
        ):
            if x.dim() != 2 or x.shape[1] != buffer.shape[1]:
                raise ValueError(f"{name} must have {buffer.shape[1]} columns, not shape {tuple(x.shape)}")
            if (x.dtype, x.device) != (buffer.dtype, buffer.device):
                raise ValueError(f"{name} must be {buffer.dtype} on {buffer.device}, not {x.dtype} on {x.device}")
        if context_1C.shape[0] != 1:
            raise ValueError(f"context must have one row, not {context_1C.shape[0]}")

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """What is launched inside follows all that was launched so before, on whatever stream."""
        if self.done is None:
            yield
            return
        self.done.wait()
        try:
            yield
        finally:  # what failed may have launched something
            self.done.record()

    def replay(self, size: int) -> torch.Tensor:
        """Logits [size] of the buffers' first rows, in memory that the next replay of any size may overwrite."""
        if size not in self.replays:
            self.replays[size] = self._captured(size) if self.cuda else lambda: self._call(size)
        return self.replays[size]()

    def _call(self, size: int) -> torch.Tensor:
        return self.network(self.context_1C, self.candidates_SR[:size])

    def _captured(self, size: int) -> Callable[[], torch.Tensor]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._call(size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do meanwhile, allocating for one, does not end the capture
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            logits_S = self._call(size)

        def replay() -> torch.Tensor:
            graph.replay()
            return logits_S

        return replay


class GraphRunner:
    """A network called by replaying a CUDA graph of it: runner(context_1C, candidates_NR) → logits [N].

    The network takes a context [1, C] and candidates [N, R] and returns one logit a candidate, each from its own row
    and the context alone: rows beyond N hold what an earlier request left there. It should be in evaluation mode; it
    runs without gradients. Above the largest size the network itself is called.

    The first call, or `warm`, fixes widths, dtype and device. Calls from several threads and streams follow each other:
    there is one set of buffers. A graph reads weights where they lay when it was captured: weights loaded in place are
    seen, a replaced parameter or module is not.

    On a CPU there are no graphs: a call goes the same way through padding and buffers and calls the network on them.
    """

    def __init__(self, network: Network, *, sizes: tuple[int, ...] = (1, 64, 256, 512, 1024, 2048)) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes must be positive numbers of rows, not {sizes}")
        self.network = network
        self.sizes = tuple(sorted(set(sizes)))
        self._lock = threading.Lock()
        self._inputs: StaticInputs | None = None

    @torch.no_grad()
    def __call__(self, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
        """Logits [N].

        Raises:
            ValueError: another width, dtype or device than the first call's, or a context of several rows.
        """
        rows = candidates_NR.shape[0]
        size = size_for(rows, self.sizes)
        with self._lock, torch.cuda.device(candidates_NR.get_device()):
            inputs = self._inputs_for(context_1C, candidates_NR)
            if size is not None:
                with inputs.in_turn():
                    inputs.context_1C.copy_(context_1C)
                    inputs.candidates_SR[:rows].copy_(candidates_NR)
                    return inputs.replay(size)[:rows].clone()
        return self.network(context_1C, candidates_NR)

    @torch.no_grad()
    def warm(self, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> None:
        """Capture all sizes now, the largest first, whose memory the others then share.

        Args:
            context_1C: an example, for its width, dtype and device.
            candidates_NR: likewise, with any number of rows.
        """
        with self._lock, torch.cuda.device(candidates_NR.get_device()):
            inputs = self._inputs_for(context_1C, candidates_NR)
            with inputs.in_turn():
                for size in reversed(self.sizes):
                    inputs.replay(size)

    def _inputs_for(self, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> StaticInputs:
        inputs = self._inputs or StaticInputs(self.network, self.sizes[-1], context_1C, candidates_NR)
        inputs.check(context_1C, candidates_NR)
        self._inputs = inputs
        return inputs
