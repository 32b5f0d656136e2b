"""All parallel blocks in two launches: `mask_project` and `block_gemm` of masknet.kernels.maskblock_gemm.

Legend: N candidates, K blocks, t units of a mask, z width of what is masked, h block width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import nn

from masknet.folding.blocks import FoldedBlock
from masknet.kernels import dispatch
from masknet.norms.base import RowNorm

_KINDS = ("rms", "l1", "bhyt")


class Form(NamedTuple):
    """What blocks must have in common."""

    kind: str
    eps: float
    constant: float
    activation: str
    weight: torch.Size
    second: torch.Size


class GroupedBlocks(nn.Module):
    """The weights of blocks of one form, each kind of them stacked; the blocks' own become views of these.

    Args:
        blocks: K of them, with masks and W.
        form: theirs.
    """

    second_weight: torch.Tensor
    second_bias: torch.Tensor
    weight: torch.Tensor

    def __init__(self, blocks: Sequence[FoldedBlock], form: Form) -> None:
        super().__init__()
        self.form = form
        self._aligned: tuple[torch.Tensor, torch.Tensor] | None = None  # as the kernels like to read the weights
        self._stack("second_weight", [block.second for block in blocks], "weight")
        self._stack("second_bias", [block.second for block in blocks], "bias")
        self._stack("weight", [block.linear for block in blocks], "weight")
        self._stack("bias", [block.linear for block in blocks], "bias")
        self._stack("scale", [block.norm for block in blocks], "scale")
        self._stack("shift", [block.norm for block in blocks], "shift")
        extras = [extra for block in blocks if (extra := _arguments(block)[0]) is not None]
        self.register_buffer("extra_K", torch.cat(extras).detach() if extras else None)

    def _stack(self, name: str, owners: Sequence[nn.Module | None], attribute: str) -> None:
        parts = [getattr(owner, attribute) for owner in owners]
        like = next((part for part in parts if part is not None), None)
        if like is None:
            self.register_buffer(name, None)
            return
        neutral = torch.ones_like(like) if attribute == "scale" else torch.zeros_like(like)
        stacked = torch.stack([neutral if part is None else part for part in parts])
        self.register_buffer(name, stacked)
        for owner, part, own in zip(owners, parts, stacked, strict=True):
            if part is not None:
                setattr(owner, attribute, own)

    def takes(self, x_ND: torch.Tensor) -> bool:
        """Whether the blocks of this input go to the kernels."""
        return dispatch.takes_gemms(x_ND, self.form.weight[0])

    def forward(self, x_ND: torch.Tensor, hidden_NT: torch.Tensor) -> torch.Tensor:
        """Outputs of all blocks [N, K·h] of what is masked and of the masks' hidden units [N, K·t]."""
        form = self.form
        if self._aligned is None:
            self._aligned = dispatch.align_rows(self.second_weight), dispatch.align_rows(self.weight)
        second_KZt, weight_KhZ = self._aligned
        masked_NKz = dispatch.mask_project(hidden_NT, second_KZt, self.second_bias, x_ND.new_empty(0), x_ND)
        rest = (self.bias, self.scale, self.shift, self.extra_K)
        return dispatch.block_gemm(masked_NKz, weight_KhZ, *rest, form.kind, form.eps, form.constant, form.activation)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self._aligned = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def grouped(blocks: Sequence[FoldedBlock]) -> GroupedBlocks | None:
    """The blocks together, where kernels can do them and they are all alike."""
    forms = {_form(block) for block in blocks}
    form = forms.pop()
    return None if forms or form is None else GroupedBlocks(blocks, form)


def _form(block: FoldedBlock) -> Form | None:
    if block.second is None or block.linear is None or block.activation not in ("none", "relu"):
        return None
    norm, kind, eps = block.norm.norm, "none", 1.0
    if norm is not None:
        if not isinstance(norm, RowNorm) or norm.kind not in _KINDS:
            return None
        kind, eps = norm.kind, norm.eps
    return Form(kind, eps, _arguments(block)[1], block.activation, block.linear.weight.shape, block.second.weight.shape)


def _arguments(block: FoldedBlock) -> tuple[torch.Tensor | None, float]:
    norm = block.norm.norm
    return norm.kernel_arguments() if isinstance(norm, RowNorm) else (None, 1.0)
