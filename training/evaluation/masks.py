"""What instance-guided masks do to the fields: the gates of a trained network over rows.

Legend: B rows of a chunk, z masked width, F fields, d embedding width; M members.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from features.batches import EncodedRows
from features.id_maps import with_rows
from masknet.blocks import InstanceGuidedMask, MaskOnlyBlock
from masknet.model import MaskNet
from masknet.networks import ParallelMaskNet
from serving.bundle import Bundle
from training.evaluation.looks import sampled
from training.evaluation.results import FloatN, MaskStatistics

ROWS = 5_000
_CHUNK = 2048  # rows


class _Gates:
    """Running sums, over the rows of all calls, of a mask's gates and of their squares."""

    def __init__(self, mask: InstanceGuidedMask) -> None:
        width = mask.project.out_features
        self.rows, self._sum_z, self._square_z = 0, np.zeros(width), np.zeros(width)
        self._hook = mask.register_forward_hook(self._see)

    def _see(self, mask: nn.Module, inputs: Any, gate_Bz: torch.Tensor) -> None:
        gate = gate_Bz.double().numpy()
        self.rows += len(gate)
        self._sum_z += gate.sum(0)
        self._square_z += (gate**2).sum(0)

    def close(self) -> None:
        self._hook.remove()

    def mean_and_deviation(self) -> tuple[FloatN, FloatN]:
        """Of each gate [z] over the rows, the deviation that of all there are (divided by their number)."""
        mean_z = self._sum_z / self.rows
        return mean_z, np.sqrt(np.maximum(self._square_z / self.rows - mean_z**2, 0.0))


def mask_statistics(bundle: Bundle, table: pa.Table, *, rows: int = ROWS, seed: int = 0) -> MaskStatistics | None:
    """Gates over at most `rows` random rows, as they are served; None of a model without masks, or without rows.

    Parallel blocks and the first of a series mask the embedding, field by field; later ones of a series mask hidden
    units, and have one number for all. Of several members the statistics are the mean: their blocks have nothing to
    do with each other but their place.
    """
    sample, _ = sampled(table.select(bundle.pipeline.names), rows, seed)
    if not bundle.config.mask or not sample.num_rows:
        return None
    served = with_rows(bundle.pipeline.as_served(sample), bundle.pipeline, bundle.scorer.id_maps)
    encoded = EncodedRows.of(served, bundle.pipeline.layout)
    found_M = [_of_member(model, encoded) for model in bundle.scorer.models]
    return MaskStatistics(
        fields=list(bundle.pipeline.names),
        mean_BF=np.mean([found.mean_BF for found in found_M], axis=0),
        deviation_BF=np.mean([found.deviation_BF for found in found_M], axis=0),
        hidden=[
            (block[0][0], float(np.mean([one[1] for one in block])), float(np.mean([one[2] for one in block])))
            for block in zip(*(found.hidden for found in found_M), strict=True)
        ],
    )


def _of_member(model: MaskNet, encoded: EncodedRows) -> MaskStatistics:
    blocks = list(model.network.blocks)
    gates = [_Gates(block.get_submodule("mask")) for block in blocks]  # type: ignore[arg-type]  # config.mask says so
    try:
        with torch.inference_mode():
            for start in range(0, encoded.num_rows, _CHUNK):
                inputs = encoded.gather(np.arange(start, min(start + _CHUNK, encoded.num_rows)))
                model.network(model.embed(*inputs))
    finally:
        for gate in gates:
            gate.close()
    of_fields: list[tuple[FloatN, FloatN]] = []
    hidden: list[tuple[int, float, float]] = []
    for number, (block, gate) in enumerate(zip(blocks, gates, strict=True)):
        mean_z, deviation_z = gate.mean_and_deviation()
        if number == 0 or isinstance(model.network, ParallelMaskNet) or isinstance(block, MaskOnlyBlock):
            of_fields.append((_by_field(mean_z, model), _by_field(deviation_z, model)))
        else:
            hidden.append((number, float(mean_z.mean()), float(deviation_z.mean())))
    mean_BF, deviation_BF = (np.stack(part) for part in zip(*of_fields, strict=True))
    return MaskStatistics(model.field_names, mean_BF, deviation_BF, hidden)


def _by_field(gate_z: FloatN, model: MaskNet) -> FloatN:
    mean_F: FloatN = gate_z.reshape(len(model.field_names), -1).mean(1)
    return mean_F
