"""Activity bands: how much of a user or an item training has seen, which decides how well a model can know it.

cold   ids that the training split does not have, or that are not told apart by the model (below min_count, evicted)
head   the most frequent ids that together make half of the training rows with known ids, ties by id
warm   the others

Rows without a value are in no band. Buckets of hashes count as what shares them: they are rarely cold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from features.dataset import GROUP, SplitFiles
from features.encoders import FIRST, MISSING, UNKNOWN, Managed, Scale, Vocabulary
from features.errors import InputError
from features.fields import CategoricalField
from features.fitting import MIN_COUNT
from features.id_maps import IdMap
from features.pipeline import FittedField
from serving.bundle import Bundle
from training.evaluation.cuts import Cut, items_of
from training.evaluation.results import SliceKind

BANDS = ("cold", "warm", "head")
MANY = 50  # ids from which a field is one of users or items
_HEAD = 0.5  # of the training rows
_RESERVED = (MISSING, UNKNOWN)


@dataclass(frozen=True)
class _Ids:
    """Something with bands: a categorical field, or the group where that is none."""

    name: str
    field: FittedField | None

    @property
    def column(self) -> str:
        return GROUP if self.field is None else self.name

    def read(self, table: pa.Table, id_maps: Mapping[str, IdMap]) -> pl.Series:
        """The id of each row; null where it is missing."""
        if self.field is None:
            return pl.Series("id", table[GROUP].combine_chunks())
        ids_N, _ = items_of(self.field, table, id_maps)
        return pl.Series("id", ids_N.astype(np.int64)).replace(MISSING, None)

    @property
    def cold(self) -> str:
        """What makes an id cold, in words."""
        if self.field is not None and isinstance(self.field.encoder, Vocabulary):
            spec = self.field.spec
            if getattr(spec, "share_with", None) or getattr(spec, "max_size", None):
                return "not in the vocabulary, or not in training"
            least = getattr(spec, "min_count", None) or MIN_COUNT
            return f"fewer than {least} times in training" if least > 1 else "not in training"
        forgotten = self.field is not None and isinstance(self.field.encoder, Managed)
        return "not in training, or forgotten since" if forgotten else "not in training"


def by_activity(bundle: Bundle, table: pa.Table, train: SplitFiles) -> list[Cut]:
    """Bands of the group, and of every categorical field with more than fifty ids; `table` is encoded by the bundle."""
    chosen = _with_bands(bundle, table)
    cuts = []
    for ids, counts in zip(chosen, _count(bundle, train, chosen), strict=True):
        bands = _bands(counts)
        sizes = dict(bands.group_by("band").len().iter_rows())
        names = [
            f"{ids.name}: cold ({ids.cold})",
            f"{ids.name}: warm (the other {sizes.get(1, 0):,} ids)",
            f"{ids.name}: head (the {sizes.get(2, 0):,} ids that make half of training)",
        ]
        kinds: list[SliceKind] = ["activity"] * len(BANDS)
        cuts.append(Cut(ids.name, kinds, names, _band_of(ids.read(table, bundle.scorer.id_maps), bands)))
    return cuts


def activity_bands(bundle: Bundle, table: pa.Table, train: SplitFiles, name: str) -> dict[str, npt.NDArray[np.bool_]]:
    """Which rows [N] are of each band of a categorical field, or of the group; InputError for anything else."""
    field = next((field for field in bundle.pipeline.fields if field.name == name), None)
    if field is None and name != bundle.schema.group:
        raise InputError(f"{name!r} is neither a field nor the group of model {bundle.name}")
    if field is not None and not isinstance(field.spec, CategoricalField):
        raise InputError(f"field {name!r} is no categorical field, so it has no activity bands")
    ids = _Ids(name, field)
    (counts,) = _count(bundle, train, [ids])
    band_N = _band_of(ids.read(table, bundle.scorer.id_maps), _bands(counts))
    return {band: band_N == number for number, band in enumerate(BANDS)}


def _with_bands(bundle: Bundle, table: pa.Table) -> list[_Ids]:
    group = bundle.schema.group
    chosen = [
        _Ids(field.name, field)
        for field in bundle.pipeline.fields
        if isinstance(field.spec, CategoricalField) and (field.name == group or _num_ids(field) > MANY)
    ]
    if group is not None and group not in bundle.pipeline.names and table[GROUP].null_count < table.num_rows:
        chosen.append(_Ids(group, None))
    return chosen


def _num_ids(field: FittedField) -> int:
    assert not isinstance(field.encoder, Scale)  # categorical fields have ids
    return field.encoder.num_ids - FIRST


def _count(bundle: Bundle, train: SplitFiles, chosen: Sequence[_Ids]) -> list[pl.DataFrame]:
    """Ids in the training split and their rows, the most frequent first: columns id, count."""
    parts: list[list[pl.DataFrame]] = [[] for _ in chosen]
    if not chosen:
        return []
    for row_group in train.row_groups:
        table = train.read(row_group, [ids.column for ids in chosen])
        for ids, found in zip(chosen, parts, strict=True):
            found.append(ids.read(table, bundle.scorer.id_maps).drop_nulls().value_counts())
    counts = []
    for ids, found in zip(chosen, parts, strict=True):
        total = pl.concat(found).group_by("id").agg(pl.col("count").sum().cast(pl.Int64))
        if ids.field is not None:
            total = total.filter(~pl.col("id").is_in(_RESERVED))
        counts.append(total.sort(["count", "id"], descending=[True, False]))
    return counts


def _bands(counts: pl.DataFrame) -> pl.DataFrame:
    """The band of each id: 2 for head, 1 for warm; columns id, band."""
    before = pl.col("count").cum_sum() - pl.col("count")
    return counts.select("id", band=pl.when(before < _HEAD * pl.col("count").sum()).then(2).otherwise(1))


def _band_of(ids: pl.Series, bands: pl.DataFrame) -> npt.NDArray[np.int16]:
    """The number of each row's band, −1 for rows without a value."""
    joined = ids.to_frame().join(bands, on="id", how="left", maintain_order="left")
    band = pl.when(pl.col("id").is_null()).then(-1).otherwise(pl.col("band").fill_null(0)).cast(pl.Int16)
    band_N: npt.NDArray[np.int16] = joined.select(band).to_series().to_numpy()
    return band_N
