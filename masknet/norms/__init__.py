"""Normalizations by name. Adding one is a module in this folder and a line in `NORMS`.

Every class is built as cls(shape, eps=…, …) for inputs [B, *shape]: (F, d) for fields' embeddings, each normalized on
its own with an affine of its own in one operation, (h,) for a hidden vector. Those of `running` take their statistics
over the rows, per channel; all others over the last axis of a row.
"""

from torch import nn

from masknet.norms.affine import AffineOnly
from masknet.norms.base import Norm
from masknet.norms.batch import BatchNorm, PRepBatchNorm
from masknet.norms.evonorm import EvoNormS0
from masknet.norms.l1 import L1Norm
from masknet.norms.layer import ConditionalLayerNorm, LayerNorm, VarianceOnlyNorm
from masknet.norms.none import NoNorm
from masknet.norms.power import PowerNorm, PowerNormV
from masknet.norms.rms import RMSNorm
from masknet.norms.tanh import BHyT, DyT, SeeDNorm
from masknet.norms.unified import UnifiedNorm

NORMS: dict[str, type[Norm]] = {
    "layer": LayerNorm,
    "rms": RMSNorm,
    "none": NoNorm,
    "batch": BatchNorm,
    "power_v": PowerNormV,
    "power": PowerNorm,
    "unified": UnifiedNorm,
    "prepbn": PRepBatchNorm,
    "dyt": DyT,
    "bhyt": BHyT,
    "seednorm": SeeDNorm,
    "l1": L1Norm,
    "evonorm_s0": EvoNormS0,
    "variance_only": VarianceOnlyNorm,
    "conditional": ConditionalLayerNorm,
    "affine": AffineOnly,
}
REFUSED = {
    "crms": "crms (arXiv 2305.14858) stores a zero-mean vector without its last entry and lets the next linear layer "
    "make up for it; with a ReLU between, as in a MaskBlock, that is wrong",
}


def make_norm(name: str, shape: tuple[int, ...], *, instance_width: int = 0, **parameters: object) -> Norm:
    """The normalization called `name` for inputs [B, *shape]; KeyError for a name that is not in `NORMS`.

    Args:
        name: a key of `NORMS`.
        shape: (F, d) or (h,).
        instance_width: width D of the raw embedding, which conditional norms read.
        parameters: eps and the norm's own.
    """
    norm = NORMS[name]
    if norm.conditional:
        parameters["instance_width"] = instance_width
    return norm(shape, **parameters)  # type: ignore[arg-type]


def settled_from(network: nn.Module) -> float:
    """The share of training that must be done before all norms of `network` are what they will be."""
    return max((module.settled_from for module in network.modules() if isinstance(module, Norm)), default=0.0)


def set_progress(network: nn.Module, done: float) -> None:
    """Tell every norm in `network` which share of training is done, from 0 to 1."""
    for module in network.modules():
        if isinstance(module, Norm):
            module.set_progress(done)
