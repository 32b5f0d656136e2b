"""A penalty on embeddings by which an id pays once a pass over the data, however often it occurs.

A row's share for an id that occurs in n rows is 1 / n (mini-batch aware regularization: Zhou et al., Deep Interest
Network, KDD 2018, arXiv 1706.06978, section 5.1). Over a pass that is λ/2 · ‖embedding‖² of every id that occurs, as
under a normal prior with variance 1 / λ per weight: a rare id, of which the rows say little, stays near 0, and a
frequent one goes where its rows pull it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.arrays import flat_values
from features.dataset import SplitFiles
from features.encoders import UNKNOWN
from features.pipeline import FeaturePipeline
from serving.bundle import tables_of
from training.distributed import World, sum_over_ranks


class EmbeddingPrior(nn.Module):
    """The penalty of each row, [B].

    Args:
        strength: λ.
        counts: of the fields that are penalized, in how many places of a pass each id occurs.
        field_names: the order of F.
        device: where the ids will be.
    """

    def __init__(
        self, strength: float, counts: Mapping[str, torch.Tensor], field_names: Sequence[str], device: torch.device
    ) -> None:
        super().__init__()
        self._strength = strength
        # Plain tensors: as buffers they would be in checkpoints, and be sent around by every step.
        self._shares = [
            (place, name, counts[name].clamp(min=1).reciprocal().float().to(device))
            for place, name in enumerate(field_names)
            if name in counts
        ]

    def forward(self, ids: KeyedJaggedTensor, emb_BFd: torch.Tensor) -> torch.Tensor:
        """λ/2 · Σ over fields of ‖embedding‖² · Σ of the field's ids' 1 / n."""
        penalty_B = emb_BFd.new_zeros(emb_BFd.shape[0])
        for place, name, share in self._shares:
            jagged = ids[name]
            lengths_B = jagged.lengths()
            share_B = torch.segment_reduce(share[jagged.values()], "sum", lengths=lengths_B, initial=0.0)
            penalty_B = penalty_B + emb_BFd[:, place].float().square().sum(1) * share_B
        return self._strength / 2 * penalty_B


def count_ids(splits: Sequence[SplitFiles], pipeline: FeaturePipeline, world: World) -> dict[str, torch.Tensor]:
    """How often each id of each field occurs in the splits that are trained on, [ids]: the same on every rank.

    Every rank must call this. Fields that share a table share the counts. Ids that training hides count as the unknown
    one. Managed fields are left out: which rows their ids get is not known yet.
    """
    fields = [field for field in pipeline.fields if not field.is_value and not field.is_managed]
    rows = {table.name: table.rows for table in tables_of(pipeline)}
    counts = {owner: torch.zeros(rows[owner], dtype=torch.float64) for owner in {field.owner for field in fields}}
    for files in splits:
        for group in files.row_groups[world.rank :: world.size]:
            table = files.read(group, [field.name for field in fields])
            for field in fields:
                counts[field.owner] += _counted(
                    table[field.name], len(counts[field.owner]), pipeline.hidden, field.name
                )
    summed = {owner: sum_over_ranks(count_I.to(world.device)).cpu() for owner, count_I in sorted(counts.items())}
    return {field.name: summed[field.owner] for field in fields}


def _counted(column: pa.ChunkedArray, num_ids: int, hidden: Mapping[str, float], name: str) -> torch.Tensor:
    """Counts [ids] of a column, as training will see it on average."""
    ids, _ = flat_values(column.combine_chunks())
    count_I = torch.from_numpy(np.bincount(ids.to_numpy(zero_copy_only=False), minlength=num_ids)).double()
    share = hidden.get(name, 0.0)
    seen_I = count_I * (1 - share)
    seen_I[UNKNOWN] += share * count_I.sum()
    return seen_I
