"""One copy to a device and one back per request.

Legend: M members, N candidates, C width of the context's embeddings, R of a candidate's.
"""

from collections.abc import Sequence

import torch

from serving.backends.base import Backend


class OneTrip:
    """Members on a device, for embeddings on the CPU: those of all travel in one page-locked buffer, so do all logits.

    Args:
        backends: a member's each; they take tensors that are on the device already.
        device: where that is; on a CPU nothing travels, and the rest is the same.
    """

    def __init__(self, backends: Sequence[Backend], device: torch.device | str) -> None:
        self._backends, self._device = tuple(backends), torch.device(device)
        self._buffer = torch.empty(0)

    @torch.inference_mode()
    def logits(self, parts_M: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Logits [M, N] in fp32 on the CPU, for one call at a time.

        Args:
            parts_M: embeddings of each member's context [1, C] and candidates [N, R].
        """
        tensors = [tensor for pair in parts_M for tensor in pair]
        moved = self._moved(tensors)
        pairs = zip(self._backends, moved[::2], moved[1::2], strict=True)
        return torch.stack([backend.logits(context_1C, x_NR) for backend, context_1C, x_NR in pairs]).cpu()

    def _moved(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        widths = [tensor.numel() for tensor in tensors]
        if sum(widths) > len(self._buffer):  # the copy before has ended: its logits have come back
            self._buffer = torch.empty(sum(widths), pin_memory=self._device.type == "cuda")
        sent = self._buffer[: sum(widths)]
        for place, tensor in zip(torch.split(sent, widths), tensors, strict=True):
            place.copy_(tensor.reshape(-1))
        moved = torch.split(sent.to(self._device, non_blocking=True), widths)
        return [each.view(tensor.shape) for each, tensor in zip(moved, tensors, strict=True)]
