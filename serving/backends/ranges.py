"""Between which bounds the inputs of a network's layers lie, on rows of data.

backends/int8-00.safetensors    of member 00: by layer, [2, Z], the least and the largest value of each input column

Legend: N rows, D width of all embeddings, Z inputs of a layer.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from features.errors import InputError, one_line
from masknet.folding import ServingNetwork
from masknet.folding.blocks import FoldedBlock
from masknet.folding.network import ParallelBody
from serving.backends.layers import inner_layers

FIRST = "first"  # what all layers read that read the raw embedding
Ranges = Mapping[str, torch.Tensor]


class Observer:
    """A folded network without a context that notes what its layers read, in any number of calls.

    Args:
        network: on the CPU, in fp32.
    """

    def __init__(self, network: ServingNetwork) -> None:
        self.network = network
        self.ranges: dict[str, torch.Tensor] = {}

    def __call__(self, context_10: torch.Tensor, emb_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N]."""
        self._note(FIRST, emb_ND)
        with self._hooks():
            logit_N: torch.Tensor = self.network(context_10, emb_ND)
        return logit_N

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = [
            layer.register_forward_pre_hook(lambda _, inputs, name=name: self._note(name, inputs[0]))
            for name, layer in inner_layers(self.network)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, name: str, x_NZ: torch.Tensor) -> None:
        low_Z, high_Z = x_NZ.amin(0), x_NZ.amax(0)
        if (known := self.ranges.get(name)) is not None:
            low_Z, high_Z = torch.minimum(known[0], low_Z), torch.maximum(known[1], high_Z)
        self.ranges[name] = torch.stack([low_Z, high_Z])


def in_order(ranges: Ranges, network: ServingNetwork) -> dict[str, torch.Tensor]:
    """Ranges of a network without a context for the same with one: columns of embeddings are the context's first."""
    fields = [*network.context_fields, *network.candidate_fields]
    dim = network.candidate_norm.dim
    column_D = torch.arange(len(fields) * dim).view(-1, dim)[fields].flatten()
    found = dict(ranges)
    for name in _readers_of_columns(network):
        found[name] = ranges[name].view(2, -1, len(column_D))[..., column_D].flatten(1)
    return found


def _readers_of_columns(network: ServingNetwork) -> list[str]:
    """Layers whose inputs are embeddings, or products with masks, of all fields; several side by side for a head."""
    body = network.body
    wide = body.blocks if isinstance(body, ParallelBody) else body.blocks[:1]
    linears = [k for k, block in enumerate(wide) if isinstance(block, FoldedBlock) and block.linear is not None]
    found = [FIRST, *(f"body.blocks.{k}.linear" for k in linears)]
    masks_alone = isinstance(body, ParallelBody) and not linears
    return [*found, "body.head.0"] if masks_alone else found


def save_ranges(path: Path, ranges: Ranges) -> None:
    """Write one member's."""
    save_file({name: range_2Z.contiguous() for name, range_2Z in ranges.items()}, path)


def load_ranges(path: Path) -> Ranges:
    """Read one member's; InputError where it is missing or no such file."""
    try:
        found: Ranges = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"bundle: {path} cannot be read: {one_line(error)}") from None
    return found
