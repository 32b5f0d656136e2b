"""A folded network on a GPU: fused kernels, and a request's launches replayed from a CUDA graph.

A GPU's products add up in an order that depends on the number of rows. In fp32 that is rounding; in bf16 it would move
scores by 1e-3. There rows travel in batches of one size, filled up, so that a row's score is the same in any company.

Legend: N candidates, C width of the context's embeddings, R of a candidate's.
"""

import copy

import torch

from masknet.folding import ServingNetwork
from masknet.kernels.graphs import GraphRunner
from serving.backends.layers import Widened, inner_layers

SIZES, ONE_SIZE = (1, 64, 256, 512, 1024, 2048), (512,)  # rows of a graph, in fp32 and where products round


class GPUBackend:
    """A network on a GPU, or anywhere in tests; see `Backend`.

    Args:
        name: of its precision.
        network: folded; a copy is moved.
        device: where to.
        dtype: of weights and products; the last layer is fp32's.
        bound: of its scores' differences.
    """

    def __init__(
        self, name: str, network: ServingNetwork, device: torch.device, dtype: torch.dtype, bound: float = 0.0
    ) -> None:
        self.name, self.bound = name, bound
        self._device, self._dtype = device, dtype
        self._sizes = SIZES if dtype == torch.float32 else ONE_SIZE
        self._runner = GraphRunner(_moved(network, device, dtype), sizes=self._sizes)
        widths = network.context_width, network.candidate_width
        self._runner.warm(*(torch.zeros(1, width, device=device, dtype=dtype) for width in widths))

    @torch.inference_mode()
    def logits(self, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
        """Logits [N] on the device."""
        context_1C, candidates_NR = (x.to(self._device, self._dtype) for x in (context_1C, candidates_NR))
        parts = torch.split(candidates_NR, self._sizes[-1])
        return torch.cat([self._runner(context_1C, part) for part in parts]).float()


def _moved(network: ServingNetwork, device: torch.device, dtype: torch.dtype) -> ServingNetwork:
    moved = copy.deepcopy(network).to(device, dtype)
    for name, layer in inner_layers(network):
        if dtype != torch.float32 and len(layer.weight) == 1:  # the logit
            moved.set_submodule(name, Widened(copy.deepcopy(layer).to(device)))
    return moved
