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


@dataclass(frozen=True)
class Formula:
    """A norm of rows in a kernel's terms: y = weight ⊙ core(x) + bias, core named by `kind` (`masknet.kernels.rows`).

    `extra` is α [F, 1] or [1] of dyt, the bound of bhyt likewise, a centre of affine, [α, β] of seednorm; `constant` is
    bhyt's κ. Gradients go through all tensors.
    """

    kind: str
    weight: torch.Tensor | None
    bias: torch.Tensor | None = None
    extra: torch.Tensor | None = None
    constant: float = 1.0


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
    odd: ClassVar[bool] = False  # whether signs pass through its core: core(s ⊙ x) = s ⊙ core(x), s of ±1
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

    def core(self, x: torch.Tensor) -> torch.Tensor:
        """What `separated` leaves of the norm; x itself where the norm folds."""
        return x

    def separated(self) -> Affine | None:
        """γ and β where the norm in evaluation is γ ⊙ core(x) + β with the same γ and β for every row."""
        return self.fold()

    @property
    def has_formula(self) -> bool:
        """Whether a kernel can compute the norm as it is now."""
        return False

    def formula(self, x: torch.Tensor) -> Formula:
        """The norm of x as it is now, where it has one; in training, running statistics see x."""
        raise NotImplementedError

    @property
    def has_fused_step(self) -> bool:
        """Whether a kernel of the norm's own can compute the next step of training."""
        return False

    def fused_step(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """activation(norm(x)) by that kernel; the activation is "none" or "relu"."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.shape}, eps={self.eps}"


class RowNorm(Norm):
    """y = γ ⊙ core(x) + β where core looks at one row by itself, over the last axis."""

    kind: ClassVar[str] = ""  # what kernels call it, if they have it
    odd = True
    biased: ClassVar[bool] = True
    bias: torch.Tensor | None

    def __init__(self, shape: tuple[int, ...], *, eps: float) -> None:
        super().__init__(shape, eps=eps)
        self.weight = nn.Parameter(torch.ones(shape))
        self.register_parameter("bias", nn.Parameter(torch.zeros(shape)) if self.biased else None)

    def core(self, x: torch.Tensor) -> torch.Tensor:
        """The norm without its affine; x is fp32 or wider."""
        raise NotImplementedError

    def normalize(self, x: torch.Tensor, instance: torch.Tensor | None) -> torch.Tensor:
        """The core with its affine."""
        core = self.core(x)
        return core * self.weight if self.bias is None else torch.addcmul(self.bias, core, self.weight)

    def separated(self) -> Affine:
        weight = self.weight.detach()
        return Affine(weight, torch.zeros_like(weight) if self.bias is None else self.bias.detach())

    @property
    def has_formula(self) -> bool:
        return bool(self.kind)

    def formula(self, x: torch.Tensor) -> Formula:
        return Formula(self.kind, self.weight, self.bias, *self.kernel_arguments())

    def kernel_arguments(self) -> tuple[torch.Tensor | None, float]:
        """`extra` and `constant` of the formula."""
        return None, 1.0
