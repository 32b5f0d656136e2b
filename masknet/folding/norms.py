"""Norms as folding leaves them: a core, a whole norm, or a scale and a shift, and the activation behind.

Legend: N candidates, T units of a first layer, h block width; *shape is (F, d) or (h,).
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from masknet.activations import ACTIVATIONS
from masknet.folding.fields import select_fields
from masknet.folding.packed import PackedLinear
from masknet.kernels import dispatch
from masknet.kernels.limits import WIDEST_FIELD, WIDEST_HIDDEN
from masknet.norms.base import Affine, Formula, Norm, RowNorm
from masknet.norms.rms import RMSNorm

_LOW = (torch.bfloat16, torch.float16)
_FEW = 50 * 400  # entries up to which the operations' number counts more than what they move


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
        self.trivial = norm is None and self.scale is None and self.shift is None  # whether nothing is left to do
        # whether a kernel for hidden vectors can do it: fields only if all are treated alike
        shapes = [each.shape for each in (norm, self.scale, self.shift) if each is not None]
        bare = self.scale is None and self.shift is None
        alike = bare and isinstance(norm, RowNorm) and norm.kind in ("layer", "rms", "l1", "variance_only")
        self._by_row = alike or any(len(shape) == 1 for shape in shapes)
        self._by_field = not self._by_row and (norm is None or isinstance(norm, RowNorm))

    def forward(self, x: torch.Tensor, hidden: Sequence[torch.Tensor] = (), activation: str = "none") -> torch.Tensor:
        """What is left of the norm of x [N, *shape], then the activation.

        Args:
            x: its input.
            hidden: outputs of the first layers.
            activation: "none" or a name in `ACTIVATIONS`.
        """
        if self.trivial:
            return activated(x if self.overwrite or activation == "none" else x.clone(), activation)
        if self._by_row and dispatch.takes_kernel("hidden_norm_act", x, WIDEST_HIDDEN, self.norm):
            inside = activation if activation == "relu" else "none"
            eps = self.norm.eps if self.norm else 1.0
            fused = dispatch.hidden_norm_act(self.formula(x), x.flatten(0, -2), eps, inside)
            return activated(fused.view(x.shape), "none" if inside == "relu" else activation)
        if self._by_field and x.dim() == 3 and dispatch.takes_kernel("embedding_norm_mask", x, WIDEST_FIELD, self.norm):
            eps = self.norm.eps if self.norm else 1.0
            pending = dispatch.PendingNorm(self.formula(x), eps, x)
            return activated(dispatch.masked(x.new_ones(()), pending).view(x.shape), activation)
        if x.dtype in _LOW:
            return activated(self.normalized(x.float(), hidden), activation).to(x.dtype)
        return activated(self.normalized(x, hidden), activation)

    def formula(self, x: torch.Tensor) -> Formula:
        """What is left, in a kernel's terms."""
        if self.norm is None:
            return Formula("affine", self.scale, self.shift)
        own = self.norm.formula(x)
        return Formula(own.kind, self.scale, self.shift, own.extra, own.constant)

    def normalized(self, x: torch.Tensor, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        """A new tensor, or x written over; x is fp32 or wider."""
        core = x if self.norm is None else self.norm.core(x)
        if self.scale is None:
            return core if self.shift is None else core + self.shift
        return core * self.scale if self.shift is None else torch.addcmul(self.shift, core, self.scale)

    def select(self, fields: Sequence[int]) -> "FoldedNorm":
        """What is left for some of the fields, by their places."""
        norm = None if self.norm is None else select_fields(self.norm, fields)
        some = self.scale if self.scale is not None else self.shift
        if some is None:
            return FoldedNorm(norm, None)
        scale = torch.ones_like(some) if self.scale is None else self.scale
        shift = torch.zeros_like(some) if self.shift is None else self.shift
        return FoldedNorm(norm, Affine(scale[list(fields)], shift[list(fields)]))

    def extra_repr(self) -> str:
        return f"scale={self.scale is not None}, shift={self.shift is not None}"


class HiddenRMS(FoldedNorm):
    """activation(scale ⊙ x / √(mean(x²) + eps) + shift) of a hidden vector, which is written over.

    Args:
        norm: RMS.
        affine: scale and shift.
        centred: whether the mean of every row is 0, so that layer norm gives the same.
    """

    def __init__(self, norm: RMSNorm, affine: Affine, *, centred: bool) -> None:
        super().__init__(norm, affine, overwrite=True)
        self.eps, self.centred = norm.eps, centred

    def get_extra_state(self) -> torch.Tensor:
        """`centred`, which is a property of the weights before it."""
        return torch.tensor(self.centred)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take `centred` over with the weights."""
        self.centred = bool(state)

    def normalized(self, x: torch.Tensor, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        """On a CPU torch's layer norm is one operation, but one that writes another tensor: for a few rows."""
        scale, shift, width = self.scale, self.shift, x.shape[-1]
        if self.centred and not torch.compiler.is_compiling() and x.numel() < _FEW:  # one program for all sizes
            scale, shift = (None if each is None else each.to(x.dtype) for each in (scale, shift))
            return functional.layer_norm(x, (width,), scale, shift, self.eps)
        norm_N1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        x.mul_(norm_N1.square_().div_(width).add_(self.eps).rsqrt_())
        if scale is not None:
            x.mul_(scale)
        return x if shift is None else x.add_(shift)


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
        self._by_row = False  # no kernel has it
        self.project, self.reader = project, reader

    def normalized(self, x: torch.Tensor, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        """The layer norm of x with the row's own affine."""
        assert self.norm is not None
        affine: torch.Tensor = self.project(hidden[self.reader])
        scale, shift = affine.to(x.dtype).view(-1, 2, *self.norm.shape).unbind(1)
        return torch.addcmul(shift, self.norm.core(x), scale)


def activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of x, written over it; "none" or a name in `ACTIVATIONS`."""
    if activation == "relu":  # the usual one, without a module's making
        return x.relu_()
    return x if activation == "none" else ACTIVATIONS[activation](inplace=True)(x)
