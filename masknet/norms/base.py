"""What all normalizations share.

Legend: B rows; an input is [B, *shape], where shape is (F, d), F fields of width d, or (h,), a hidden vector.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

# Types of the constructors' parameters; configurations are checked against them.
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Affine:
    """y = scale ⊙ x + shift, both of a norm's shape: a norm that looks at no statistics of its input."""

    scale: torch.Tensor
    shift: torch.Tensor


def variance(x: torch.Tensor) -> torch.Tensor:
    """Biased variance of the last axis, kept as an axis of 1; unlike torch.var it takes an empty batch in silence."""
    return (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)


class Norm(nn.Module):
    """A normalization of inputs [B, *shape], built as cls(shape, eps=…, …).

    A subclass says in `normalize` what it does to an input of fp32 or wider; lower precisions are widened before and
    narrowed after. The further keyword parameters of its constructor are the keys of its slot in a configuration.
    """

    default_eps: ClassVar[float] = 1e-5
    replaces_activation: ClassVar[bool] = False  # whether no activation follows it, because it contains one
    scale_invariant: ClassVar[bool] = False  # whether c · x, c > 0, gives what x gives, but for eps
    conditional: ClassVar[bool] = False  # whether the constructor takes instance_width, the width D of `instance`

    def __init__(self, shape: tuple[int, ...], *, eps: float) -> None:
        super().__init__()
        self.shape, self.eps = tuple(shape), eps

    def forward(self, x: torch.Tensor, instance: torch.Tensor | None = None) -> torch.Tensor:
        """Normalize x [B, *shape]; `instance` [B, D] is the raw embedding, for norms that condition on it."""
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return self.normalize(wide, instance).to(x.dtype)

    def normalize(self, x: torch.Tensor, instance: torch.Tensor | None) -> torch.Tensor:
        """The norm of x, which is fp32 or wider."""
        raise NotImplementedError

    def set_progress(self, done: float) -> None:
        """Told by the training loop before every step which share of training is done, for norms that anneal."""

    @property
    def settled_from(self) -> float:
        """The share of training after which the norm is what it will be; 0 for norms that do not anneal."""
        return 0.0

    def fold(self) -> Affine | None:
        """The affine that equals the norm in evaluation, if there is one for all inputs."""
        return None

    def extra_repr(self) -> str:
        return f"{self.shape}, eps={self.eps}"
