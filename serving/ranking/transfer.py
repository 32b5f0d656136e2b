"""One copy to a device and one back per request.

Legend: N candidates, C width of the context's embeddings, R of a candidate's.
"""

import torch

from serving.backends.base import Backend


class OneCopy:
    """A backend on a device, for embeddings on the CPU: both parts travel in one page-locked buffer, logits come back.

    Args:
        backend: takes tensors that are on its device already.
        device: where that is; on a CPU nothing travels, and the rest is the same.
    """

    def __init__(self, backend: Backend, device: torch.device | str) -> None:
        self.name, self.bound = backend.name, backend.bound
        self._backend, self._device = backend, torch.device(device)
        self._buffer = torch.empty(0)

    @torch.inference_mode()
    def logits(self, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
        """Logits [N] in fp32 on the CPU."""
        widths = [context_1C.numel(), candidates_NR.numel()]
        if sum(widths) > len(self._buffer):  # the copy before has ended: its logits have come back
            self._buffer = torch.empty(sum(widths), pin_memory=self._device.type == "cuda")
        context, candidates = torch.split(self._buffer[: sum(widths)], widths)
        context.copy_(context_1C.view(-1))
        candidates.copy_(candidates_NR.reshape(-1))
        moved = self._buffer[: sum(widths)].to(self._device, non_blocking=True)
        context, candidates = torch.split(moved, widths)
        found_N = self._backend.logits(context.view(context_1C.shape), candidates.view(candidates_NR.shape))
        return found_N.cpu()
