"""What people call the groups of values that drift is told over."""

from itertools import pairwise

from features.encoders import FIRST, DatePart, Identity, LogBucket, Quantile, Scale, Vocabulary
from features.pipeline import FittedField
from features.stats import BINS
from serving.monitoring.reference import FieldReference
from training.evaluation.names import range_name, value_of


def group_names(field: FittedField, reference: FieldReference) -> list[str]:
    """Missing, never seen, each bin by its values where they have names, all others."""
    return ["missing", "never seen", *(_bin_name(field, reference, place) for place in reference.bins), "all others"]


def score_names(starts: tuple[float, ...]) -> list[str]:
    """The ranges between the starts of the score's bins."""
    if not starts:
        return ["any score"]
    between = [f"{low:.4g} to {high:.4g}" for low, high in pairwise(starts)]
    return [f"below {starts[0]:.4g}", *between, f"{starts[-1]:.4g} and more"]


def _bin_name(field: FittedField, reference: FieldReference, place: int) -> str:
    encoder, edges = field.encoder, reference.edges
    if isinstance(encoder, Scale):
        at = place - FIRST
        return range_name(field, edges[at - 1] if at else None, edges[at] if at < len(edges) else None)
    if isinstance(encoder, (Quantile, LogBucket)):
        return range_name(field, place if place > FIRST else None, place + 1 if place + 1 < encoder.num_ids else None)
    if isinstance(encoder, Vocabulary) and place == BINS - 1 < encoder.num_ids - 1:
        return f"the rarer of {len(encoder.values):,} values"
    if isinstance(encoder, Vocabulary) or (isinstance(encoder, (Identity, DatePart)) and encoder.num_ids <= BINS):
        return value_of(field, place)
    return f"hashes in bin {place}"
