"""Norms as folding leaves them: a core, a whole norm, or a scale and a shift, and the activation behind.

Legend: N candidates, T units of a first layer, h block width; *shape is (F, d) or (h,).
"""

from collections.abc import Sequence

import torch
from torch import nn

from masknet.activations import ACTIVATIONS
from masknet.folding.fields import select_fields
from masknet.folding.packed import PackedLinear
from masknet.kernels import dispatch
from masknet.norms.base import Affine, Formula, Norm, RowNorm
from masknet.norms.rms import RMSNorm


class FoldedNorm(nn.Module):
    """activation(scale ⊙ core(x) + shift); a scale of ones and a shift of zeros cost nothing.

    Args:
        norm: whose core it is; None for x itself.
        affine: scale and shift, of the norm's shape; None for neither.
        overwrite: whether x may be written to.
    """

    scale: torch.Tensor | None
    shift: torch.Tensor | None

    def __init__(self, norm: Norm | None, affine: Affine | None, *, overwrite: bool = False) -> None:
        super().__init__()
        self.norm, self.overwrite = norm, overwrite
        scale, shift = (None, None) if affine is None else (affine.scale, affine.shift)
        self.register_buffer("scale", None if scale is None or bool((scale == 1).all()) else scale)
        self.register_buffer("shift", None if shift is None or not bool(shift.any()) else shift)

    @property
    def trivial(self) -> bool:
        """Whether nothing is left to do."""
        return self.norm is None and self.scale is None and self.shift is None

    def forward(self, x: torch.Tensor, hidden: Sequence[torch.Tensor] = (), activation: str = "none") -> torch.Tensor:
        """What is left of the norm of x [N, *shape], then the activation.

        Args:
            x: its input.
            hidden: outputs of the first layers.
            activation: "none" or a name in `ACTIVATIONS`.
        """
        if self.trivial:
            return activated(x if self.overwrite or activation == "none" else x.clone(), activation)
        rows = self._rows(x)
        if rows is not None and dispatch.takes_kernel("hidden_norm_act", rows, dispatch.WIDEST_HIDDEN, self.norm):
            inside = activation if activation == "relu" else "none"
            fused = dispatch.hidden_norm_act(self.formula(x), rows, self.norm.eps if self.norm else 1.0, inside)
            return activated(fused.view(x.shape), "none" if inside == "relu" else activation)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return activated(self.normalized(wide, hidden), activation).to(x.dtype)

    def formula(self, x: torch.Tensor) -> Formula:
        """What is left, in a kernel's terms."""
        if self.norm is None:
            return Formula("affine", self.scale, self.shift)
        own = self.norm.formula(x)
        return Formula(own.kind, self.scale, self.shift, own.extra, own.constant)

    def _rows(self, x: torch.Tensor) -> torch.Tensor | None:
        """x as hidden vectors, which fields are where all are treated alike; None where a kernel has no use for it."""
        if x.dim() == 2:
            return x
        bare = self.scale is None and self.shift is None
        alike = isinstance(self.norm, RowNorm) and self.norm.kind in ("layer", "rms", "l1", "variance_only")
        return x.flatten(0, 1) if bare and alike else None

    def normalized(self, x: torch.Tensor, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        """A new tensor, or x written over; x is fp32 or wider."""
        if isinstance(self.norm, RMSNorm) and self.overwrite:
            return rms_affine(x, self.scale, self.shift, self.norm.eps)
        core = x if self.norm is None else self.norm.core(x)
        if self.scale is None:
            return core if self.shift is None else core + self.shift
        return core * self.scale if self.shift is None else torch.addcmul(self.shift, core, self.scale)

    def select(self, fields: Sequence[int]) -> "FoldedNorm":
        """What is left for some of the fields, by their places."""
        part = FoldedNorm(None if self.norm is None else select_fields(self.norm, fields), None)
        part.scale, part.shift = (None if each is None else each[list(fields)] for each in (self.scale, self.shift))
        return part

    def extra_repr(self) -> str:
        return f"scale={self.scale is not None}, shift={self.shift is not None}"


class WholeNorm(FoldedNorm):
    """A norm that goes on as it is, because its scale depends on the row."""

    def __init__(self, norm: Norm) -> None:
        super().__init__(norm, None)

    def formula(self, x: torch.Tensor) -> Formula:
        """The norm's own."""
        assert self.norm is not None
        return self.norm.formula(x)

    def select(self, fields: Sequence[int]) -> "WholeNorm":
        """The norm of some of the fields."""
        assert self.norm is not None
        return WholeNorm(select_fields(self.norm, fields))

    def normalized(self, x: torch.Tensor, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        """The norm of x."""
        assert self.norm is not None
        out: torch.Tensor = self.norm(x)
        return out


class FoldedConditional(FoldedNorm):
    """A conditional layer norm whose first layer is one of the first layers and whose γ and β are in the second's bias.

    Args:
        norm: what has the core, a conditional layer norm or a partial norm around one.
        project: the second layer, [2 · entries of the shape, T].
        reader: place of its first layer among the first layers.
    """

    def __init__(self, norm: Norm, project: PackedLinear, reader: int) -> None:
        super().__init__(norm, None)
        self.project, self.reader = project, reader

    def normalized(self, x: torch.Tensor, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        """The layer norm of x with the row's own affine."""
        assert self.norm is not None
        affine: torch.Tensor = self.project(hidden[self.reader])
        scale, shift = affine.to(x.dtype).view(-1, 2, *self.norm.shape).unbind(1)
        return torch.addcmul(shift, self.norm.core(x), scale)


def rms_affine(x_Nh: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None, eps: float) -> torch.Tensor:
    """scale ⊙ x / √(mean(x²) + eps) + shift over the last axis, written over x: three passes and no large tensor."""
    norm_N1 = torch.linalg.vector_norm(x_Nh, dim=-1, keepdim=True)
    x_Nh.mul_(norm_N1.square_().div_(x_Nh.shape[-1]).add_(eps).rsqrt_())
    if scale is not None:
        x_Nh.mul_(scale)
    return x_Nh if shift is None else x_Nh.add_(shift)


def activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of x, written over it; "none" or a name in `ACTIVATIONS`."""
    return x if activation == "none" else ACTIVATIONS[activation](inplace=True)(x)
