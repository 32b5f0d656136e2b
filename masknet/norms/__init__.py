"""Normalizations by name. Adding one is a module in this folder and a line in `NORMS`.

Every class is built as cls(shape, eps=…), normalizes the last axis of an input [..., *shape] and has an affine of
`shape`: (F, d) normalizes each field's embedding on its own, (h,) a hidden vector.
"""

from torch import nn

from masknet.norms.layer import LayerNorm
from masknet.norms.none import NoNorm
from masknet.norms.rms import RMSNorm

NORMS: dict[str, type[LayerNorm] | type[RMSNorm] | type[NoNorm]] = {
    "layer": LayerNorm,
    "rms": RMSNorm,
    "none": NoNorm,
}


def make_norm(name: str, shape: tuple[int, ...], *, eps: float) -> nn.Module:
    """The normalization called `name` for inputs [..., *shape]; KeyError for a name that is not in `NORMS`."""
    return NORMS[name](shape, eps=eps)
