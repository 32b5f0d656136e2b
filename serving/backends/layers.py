"""A folded network with other linear layers, which treats a row the same whatever else is in its batch.

The folded network takes other ways for one row and for a few, which differ in rounding. That is of no consequence in
fp32; rounded to eight bits it would move scores by 1e-3.

Legend: N candidates, C width of the context's embeddings, R of a candidate's, T units of all first layers.
"""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from masknet.folding import ServingNetwork
from masknet.folding.blocks import FoldedBlock, Hidden
from masknet.folding.network import ParallelBody
from masknet.folding.norms import FoldedConditional, HiddenRMS
from masknet.folding.packed import PackedLinear
from masknet.norms.layer import LayerNorm

ContextBias = Callable[[torch.Tensor], torch.Tensor]  # [1, C] → [T]
Part = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # candidates and bias → hidden units
MakeFirst = Callable[[ServingNetwork], "ContextApart"]  # of a network whose other layers are replaced already


class ContextApart(nn.Module):
    """The first layers, always with the context's share as the candidates' bias.

    Args:
        context_bias: [1, C] → [T], the layers' own bias included.
        parts: of each reader, (candidates, bias) → its hidden units.
        sizes: units of each reader.
        prepare: what all parts read, made of the candidates' embeddings.
    """

    def __init__(
        self,
        context_bias: ContextBias,
        parts: Sequence[Part],
        sizes: Sequence[int],
        prepare: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self._context_bias, self._parts, self._sizes, self._prepare = context_bias, parts, list(sizes), prepare

    def forward(self, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> Hidden:
        """Hidden units of all readers."""
        biases = torch.split(self._context_bias(context_1C), self._sizes)
        x_NR = self._prepare(candidates_NR)
        return Hidden([part(x_NR, bias) for part, bias in zip(self._parts, biases, strict=True)])


class Widened(nn.Module):
    """The last layer in fp32, behind layers in bf16: its output would lose there what it is about.

    Args:
        layer: in fp32.
    """

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_NZ: torch.Tensor) -> torch.Tensor:
        """Outputs [N, 1] in fp32."""
        out: torch.Tensor = self.layer(x_NZ.float())
        return out


def with_layers(
    network: ServingNetwork, replace: Callable[[str, PackedLinear], nn.Module], first: MakeFirst
) -> ServingNetwork:
    """A copy of a network on the CPU with other layers.

    Args:
        network: folded.
        replace: makes the layer that stands for one, given its name too, for all but the first layers.
        first: makes what stands for the first layers.
    """
    network = copy.deepcopy(network)
    for name, layer in inner_layers(network):
        network.set_submodule(name, replace(name, layer))
    for module in network.modules():
        if isinstance(module, HiddenRMS):
            module.centred = False  # or a few rows are normalized by another operation than many
        if isinstance(module, LayerNorm):
            module.by_size = False
        if isinstance(module, ParallelBody):
            module.grouped = None  # a GPU's; it would keep the weights
    if network.first is not None:
        network.set_submodule("first", first(network))
    return network


def inner_layers(network: ServingNetwork) -> list[tuple[str, PackedLinear]]:
    """All linear layers but the first ones, by name."""
    found = [(name, module) for name, module in network.named_modules() if isinstance(module, PackedLinear)]
    return [(name, layer) for name, layer in found if name.partition(".")[0] != "first"]


def readers(network: ServingNetwork) -> Iterator[tuple[int, nn.Module]]:
    """The layers that read the first layers' units, with their places among those."""
    for module in network.modules():
        if isinstance(module, FoldedBlock) and module.second is not None:
            yield module.reader, module.second
        elif isinstance(module, FoldedConditional):
            yield module.reader, module.project
