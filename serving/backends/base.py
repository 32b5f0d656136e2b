"""What a backend is: raw embeddings in, logits out.

Legend: N candidates, C width of the context's embeddings, R of a candidate's.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import torch

Kind = Literal["exact", "fast"]
Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Backend(Protocol):
    """One member's network on one device."""

    name: str  # fp32, int8, mixed or bf16
    bound: float  # the largest difference in probability from the reference scorer that was seen; 0 for fp32

    def logits(self, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
        """Logits [N] in fp32, before the sampling correction, of raw embeddings in fp32; for one call at a time.

        Args:
            context_1C: of the fields that all candidates share; [1, 0] where there are none.
            candidates_NR: of the others, at least one row.
        """
        ...


class CPUBackend:
    """A network on the CPU.

    Args:
        name: of its precision.
        network: takes and gives what `logits` does.
        threads: of its products; by default as torch has it.
        bound: see `Backend`.
    """

    def __init__(self, name: str, network: Network, threads: int | None = None, bound: float = 0.0) -> None:
        self.name, self.bound = name, bound
        self._network, self._threads = network, threads

    @torch.inference_mode()
    def logits(self, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
        """Logits [N]."""
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)  # OpenMP keeps the number by calling thread
        return self._network(context_1C, candidates_NR)
