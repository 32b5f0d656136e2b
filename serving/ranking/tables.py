"""A model's embedding tables as one, in fp32 or in FBGEMM's quantized form: a lookup of all fields is one gather.

Legend: R rows of all tables, L rows looked up, d embedding width.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import nn

from masknet.model import MaskNet

Precision = Literal["fp32", "fp16", "int8"]
_TYPES = {"fp16": SparseType.FP16, "int8": SparseType.INT8}
_CHUNK = 65_536  # rows that are quantized at once: bounds memory
_MULTIPLE = 4  # FBGEMM's int8 rows have a width that is one of this; what is added repeats the last entry


class Place(NamedTuple):
    """Where a field's ids lie in the rows of all tables, and whether several of a row are averaged or summed."""

    offset: int
    mean: bool


class Tables:
    """All tables of a model below each other.

    In fp32 the model's own tables become views of these rows, so that they are in memory once. int8 has a scale and a
    shift for each row; what it gives is off by half a step at most, (largest − smallest) / 510.

    Args:
        model: whose tables they are.
        precision: of the entries in memory; lookups give fp32.
    """

    def __init__(self, model: MaskNet, precision: Precision) -> None:
        configs = model.embeddings.embedding_bag_configs()
        bags = [model.embeddings.embedding_bags[config.name] for config in configs]
        starts = torch.tensor([0, *(bag.weight.shape[0] for bag in bags)]).cumsum(0).tolist()
        self.places = {
            name: Place(start, config.pooling.name == "MEAN")
            for config, start in zip(configs, starts, strict=False)
            for name in config.feature_names
        }
        self.precision, self.dim = precision, configs[0].embedding_dim
        self.num_rows = starts[-1]
        self.largest_error = 0.0  # of an entry, absolute
        self._weight_Rd: torch.Tensor | None = None
        self._quantized: IntNBitTableBatchedEmbeddingBagsCodegen | None = None
        if precision == "fp32":
            self._weight_Rd = _one_below_the_other(bags, starts)
        else:
            self._quantize(bags, _TYPES[precision])

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in memory."""
        if self._weight_Rd is not None:
            return self._weight_Rd.nbytes
        assert self._quantized is not None
        return int(self._quantized.weights_host.nbytes)

    def rows(self, place_L: torch.Tensor) -> torch.Tensor:
        """Rows [L, d] in fp32, by their places (int64) in all rows."""
        if self._weight_Rd is not None:
            return self._weight_Rd.index_select(0, place_L)
        assert self._quantized is not None
        found: torch.Tensor = self._quantized(place_L, torch.arange(len(place_L) + 1))
        return found[:, : self.dim]

    def _quantize(self, bags: list[nn.EmbeddingBag], kind: SparseType) -> None:
        width = self.dim + (-self.dim % _MULTIPLE if kind is SparseType.INT8 else 0)
        self._quantized = IntNBitTableBatchedEmbeddingBagsCodegen(
            [("", self.num_rows, width, kind, EmbeddingLocation.HOST)],
            device="cpu",
            output_dtype=SparseType.FP32,
            bounds_check_mode=BoundsCheckMode.NONE,  # encoders give no other ids than a table has rows
            indices_dtype=torch.int64,
            row_alignment=1,
        )
        self._quantized.initialize_weights()
        ((entries_Rb, scales_Rb),) = self._quantized.split_embedding_weights()
        start = 0
        for rows_Cd in _chunks(bags):
            stop = start + len(rows_Cd)
            wide = torch.cat([rows_Cd, rows_Cd[:, -1:].expand(-1, width - self.dim)], 1)
            if kind is SparseType.FP16:
                entries_Rb[start:stop] = wide.half().view(torch.uint8)
            else:  # scale and shift come behind the entries, in fp32
                fused_Cb = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(wide)
                entries_Rb[start:stop] = fused_Cb[:, :-8]
                scales_Rb[start:stop] = fused_Cb[:, -8:].contiguous().view(torch.float32).half().view(torch.uint8)
            error = (self.rows(torch.arange(start, stop)) - rows_Cd).abs().max()
            self.largest_error = max(self.largest_error, float(error))
            start = stop


@torch.no_grad()
def _one_below_the_other(bags: list[nn.EmbeddingBag], starts: list[int]) -> torch.Tensor:
    weight_Rd = torch.cat([bag.weight.detach() for bag in bags])
    for bag, start, stop in zip(bags, starts, starts[1:], strict=False):
        bag.weight = nn.Parameter(weight_Rd[start:stop], requires_grad=False)
    return weight_Rd


def _chunks(bags: list[nn.EmbeddingBag]) -> Iterator[torch.Tensor]:
    for bag in bags:
        yield from torch.split(bag.weight.detach(), _CHUNK)
