"""The rows that a slice rule speaks of, by the challenger's encoding.

Legend: N rows, n those of the slice, I items (a row's single value, or those of its list).
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.dataset import SplitFiles
from features.encoders import MISSING, UNKNOWN, DatePart, Hash, LogBucket, Quantile, Scale
from features.errors import InputError, listed
from features.fields import CrossField, DateField
from features.pipeline import FittedField
from serving.bundle import Bundle
from training.evaluation.activity import BANDS, activity_bands
from training.evaluation.cuts import items_of
from training.promotion.config import SliceRule

IndexN = npt.NDArray[np.integer]
_NEVER_UNKNOWN = (DatePart, Hash, LogBucket, Quantile)


def rows_of_rule(rule: SliceRule, bundle: Bundle, table: pa.Table, train: SplitFiles | None) -> IndexN:
    """Places of the rule's rows among those of `table`; a row of a list field belongs to each of its values.

    Args:
        rule: the slice.
        bundle: the challenger.
        table: the evaluated rows, in its encoding.
        train: the training split in its encoding, or None.

    Raises:
        InputError: the model has no such field, or knows no such value of it; every value of the field
            is known; or the rule needs the training rows.
    """
    if rule.is_ in BANDS:
        if train is None:
            raise InputError(f"promotion config: slice {rule.name!r} needs the training split, which --data has")
        return np.flatnonzero(activity_bands(bundle, table, train, rule.field)[rule.is_])
    field = next((field for field in bundle.pipeline.fields if field.name == rule.field), None)
    if field is None:
        names = listed(list(bundle.pipeline.names))
        raise InputError(f"promotion config: slice {rule.name!r}: the model has no such field; it has {names}")
    if isinstance(field.encoder, Scale):
        return _rows_of_number(rule, field, table)
    if rule.is_ == "unknown" and isinstance(field.encoder, _NEVER_UNKNOWN):
        raise InputError(
            f"promotion config: slice {rule.name!r}: no value of {field.name} is unknown: every one has a bucket"
        )
    ids_I, row_I = items_of(field, table, bundle.scorer.id_maps)
    wanted = {"missing": MISSING, "unknown": UNKNOWN}.get(rule.is_ or "")
    if wanted is None:
        wanted = _id_of(rule, field, bundle)
    place_I = np.flatnonzero(ids_I == wanted)
    return place_I if row_I is None else np.unique(row_I[place_I])


def _rows_of_number(rule: SliceRule, field: FittedField, table: pa.Table) -> IndexN:
    if rule.is_ != "missing":
        raise InputError(f"promotion config: slice {rule.name!r}: {field.name} is a number without buckets")
    return np.flatnonzero(np.isnan(table[field.name].to_numpy()))


def _id_of(rule: SliceRule, field: FittedField, bundle: Bundle) -> int:
    """The id of the rule's value: that of a row which has it, and nothing else."""
    if isinstance(field.spec, CrossField | DateField):
        raise InputError(f"promotion config: slice {rule.name!r}: values of a {field.spec.type} field have no names")
    row: dict[str, pa.Array] = {}
    for other in bundle.pipeline.inputs:
        name = other.spec.from_ if isinstance(other.spec, DateField) else other.name
        value = [rule.value] if field.is_list else rule.value
        row[name] = pa.array([value if other.name == field.name else None])
    ids_I, _ = items_of(field, bundle.pipeline.encode(pa.table(row)), bundle.scorer.id_maps)
    if len(ids_I) != 1 or ids_I[0] in (MISSING, UNKNOWN):
        raise InputError(f"promotion config: slice {rule.name!r}: the model knows no such value")
    return int(ids_I[0])
