"""What the blocks of a trained network do: their outputs, gates and gradients, and what each is worth.

Everything is measured in evaluation mode on rows of the test split. Legend: B rows, F fields, d embedding width, h
width of a block's output, z width of what it masks.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torch.nn import functional

from features.batches import EncodedRows
from features.dataset import LABEL, WEIGHT, PreparedDataset
from features.id_maps import IdMap, with_rows
from features.metrics import auc
from masknet.model import MaskNet
from masknet.networks import ParallelMaskNet
from masknet.norms.tanh import BHyT, DyT

GRADIENT_ROWS = 4096
SATURATED = 2.0  # |x| from which tanh has less than 7 % of its slope
_CONSTANT = 1e-12  # variance of a channel that says nothing

Facts = dict[str, float | None]


@dataclass(frozen=True)
class Sample:
    """Rows as a network reads them: embeddings, labels and weights."""

    emb_BFd: torch.Tensor
    label_B: torch.Tensor
    weight_B: torch.Tensor


def sampled(
    model: MaskNet,
    dataset: PreparedDataset,
    table: pa.Table,
    id_maps: Mapping[str, IdMap] = MappingProxyType({}),
) -> Sample:
    """Embeddings of encoded rows, as they are served; `id_maps` are those of managed tables."""
    served = with_rows(dataset.pipeline.as_served(table), dataset.pipeline, id_maps)
    rows = EncodedRows.of(served, dataset.pipeline.layout)
    with torch.no_grad():
        emb_BFd = model.eval().embed(*rows.gather(np.arange(table.num_rows)))
    label_B, weight_B = (torch.from_numpy(table[name].to_numpy().astype(np.float32)) for name in (LABEL, WEIGHT))
    return Sample(emb_BFd, label_B, weight_B)


def diagnose(network: nn.Module, sample: Sample) -> list[Facts]:
    """Facts for each block, in order; None where one does not apply.

    output_variance: over rows and channels. dead: share of channels that are the same for all rows.
    gradient_norm: of the loss by the block's W (by its mask's last layer where it has none).
    saturation: share of the hidden norm's tanh arguments beyond ±2.
    gate_mean, gate_deviation (of a gate over rows, mean over gates), gate_negative (share): of the mask.
    angle: mean angle between this block's output and that of the block before, over π.
    auc_drop: AUC lost without the block, which then gives 0 (parallel) or its input (serial, if the widths allow it).
    """
    network.eval()
    blocks = list(network.get_submodule("blocks").children())
    seen = [_Watch(block) for block in blocks]
    with torch.no_grad():
        logit_B = network(sample.emb_BFd)
    for watch in seen:
        watch.close()
    whole = auc(sample.label_B.numpy(), logit_B.numpy())
    gradients = _gradients(network, [_weight_of(block) for block in blocks], sample)
    facts = []
    for index, (watch, gradient) in enumerate(zip(seen, gradients, strict=True)):
        before = seen[index - 1].output_Bh if index else None
        drop = None if whole is None else _auc_without(network, blocks[index], sample, whole)
        facts.append({**watch.facts(before), "gradient_norm": _norm(gradient), "auc_drop": drop})
    return facts


def _gradients(network: nn.Module, weights: list[torch.Tensor], sample: Sample) -> Sequence[torch.Tensor | None]:
    """Of the mean loss over the first rows, which bounds the memory that a backward pass takes."""
    emb_BFd, label_B, weight_B = (part[:GRADIENT_ROWS] for part in (sample.emb_BFd, sample.label_B, sample.weight_B))
    loss = functional.binary_cross_entropy_with_logits(network(emb_BFd), label_B, weight_B)
    return torch.autograd.grad(loss, weights, allow_unused=True)


class _Watch:
    """Keeps what a block puts out, and its mask and the arguments of its norm's tanh, where it has them."""

    def __init__(self, block: nn.Module) -> None:
        self.output_Bh = self.gate_Bz = self.argument_Bh = torch.empty(0)
        norm = getattr(block, "norm", None)
        self._hooks = [
            block.register_forward_hook(self._output),
            block.get_submodule("mask").register_forward_hook(self._gate),
        ]
        if isinstance(norm, DyT | BHyT):
            self._hooks.append(norm.register_forward_pre_hook(self._argument))

    def _output(self, block: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.output_Bh = output.detach()

    def _gate(self, mask: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.gate_Bz = output.detach()

    def _argument(self, norm: nn.Module, inputs: Any) -> None:
        assert isinstance(norm, DyT | BHyT)  # what it was registered on
        self.argument_Bh = norm.bounded(inputs[0]).detach()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def facts(self, before_Bh: torch.Tensor | None) -> Facts:
        gates = self.gate_Bz if self.gate_Bz.ndim == 2 else None
        tanh = self.argument_Bh if self.argument_Bh.ndim == 2 else None
        return {
            "output_variance": float(self.output_Bh.var()),
            "dead": float((self.output_Bh.var(0) <= _CONSTANT).float().mean()),
            "saturation": None if tanh is None else float((tanh.abs() > SATURATED).float().mean()),
            "gate_mean": None if gates is None else float(gates.mean()),
            "gate_deviation": None if gates is None else float(gates.std(0).mean()),
            "gate_negative": None if gates is None else float((gates < 0).float().mean()),
            "angle": None if before_Bh is None else _angle(before_Bh, self.output_Bh),
        }


def _angle(first_Bh: torch.Tensor, second_Bh: torch.Tensor) -> float | None:
    if first_Bh.shape != second_Bh.shape:
        return None
    cosine_B = functional.cosine_similarity(first_Bh.double(), second_Bh.double(), dim=1).clamp(-1, 1)
    return float(cosine_B.arccos().mean()) / math.pi


def _weight_of(block: nn.Module) -> torch.Tensor:
    linear = getattr(block, "linear", None)
    return block.get_parameter("mask.project.weight") if linear is None else linear.weight


def _norm(gradient: torch.Tensor | None) -> float | None:
    return None if gradient is None else float(gradient.norm())


def _auc_without(network: nn.Module, block: nn.Module, sample: Sample, whole: float) -> float | None:
    parallel = isinstance(network, ParallelMaskNet)
    with torch.no_grad(), _replaced(block, parallel) as possible:
        score_B = network(sample.emb_BFd).numpy()
    return whole - (auc(sample.label_B.numpy(), score_B) or 0.0) if possible else None


@contextmanager
def _replaced(block: nn.Module, parallel: bool) -> Iterator[list[bool]]:
    """Within the block, `block` gives 0 (parallel) or its input; yields a list that is empty where the widths
    differ."""
    possible: list[bool] = []

    def replace(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        replaced: torch.Tensor = torch.zeros_like(output) if parallel else inputs[0]
        if replaced.shape != output.shape:
            return output
        possible.append(True)
        return replaced

    hook = block.register_forward_hook(replace)
    try:
        yield possible
    finally:
        hook.remove()
