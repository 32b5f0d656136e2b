"""Between which bounds the inputs of a network's layers are rounded, found on rows of data.

backends/int8-00.safetensors    of member 00: by layer, [2, Z], the least and the largest value of each column, or less

Legend: N rows, D width of all embeddings, Z inputs and O outputs of a layer.
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
from serving.backends.bounds import best_bounds
from serving.backends.layers import inner_layers

FIRST = "first"  # what all layers read that read the raw embedding
KEPT_ROWS = 2048  # of each layer
Ranges = Mapping[str, torch.Tensor]


class _Seen:
    """Of one layer's input: the bounds of each column on all rows, and every so many-th row."""

    def __init__(self, width: int) -> None:
        self.range_2Z = torch.tensor([[torch.inf], [-torch.inf]]).expand(2, width)
        self.kept_NZ = torch.empty(0, width)
        self._rows, self._every = 0, 1

    def add(self, x_NZ: torch.Tensor) -> None:
        low_Z, high_Z = torch.minimum(self.range_2Z[0], x_NZ.amin(0)), torch.maximum(self.range_2Z[1], x_NZ.amax(0))
        self.range_2Z = torch.stack([low_Z, high_Z])
        self.kept_NZ = torch.cat([self.kept_NZ, x_NZ[-self._rows % self._every :: self._every]])
        self._rows += len(x_NZ)
        while len(self.kept_NZ) > KEPT_ROWS:
            self.kept_NZ, self._every = self.kept_NZ[::2].clone(), 2 * self._every


class Observer:
    """A folded network without a context that notes what its layers read, in any number of calls.

    Args:
        network: on the CPU, in fp32.
    """

    def __init__(self, network: ServingNetwork) -> None:
        self.network = network
        self._seen: dict[str, _Seen] = {}

    def __call__(self, context_10: torch.Tensor, emb_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N]."""
        self._note(FIRST, emb_ND)
        with self._hooks():
            logit_N: torch.Tensor = self.network(context_10, emb_ND)
        return logit_N

    def ranges(self) -> Ranges:
        """The bounds of each layer with which its product loses little, see `best_bounds`; it takes a second or two."""
        layers = dict(inner_layers(self.network))
        found = {name: self._best(name, layer.weight) for name, layer in layers.items()}
        if self.network.first is not None:
            found[FIRST] = self._best(FIRST, self.network.first.whole.weight)
        return found

    def _best(self, name: str, weight_OZ: torch.Tensor) -> torch.Tensor:
        seen = self._seen[name]
        return best_bounds(seen.range_2Z, seen.kept_NZ, weight_OZ)

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
        self._seen.setdefault(name, _Seen(x_NZ.shape[1])).add(x_NZ)


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
    found = [FIRST] if network.first is not None else []
    found += [f"body.blocks.{k}.linear" for k in linears]
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
