"""All parallel blocks at once, by `mask_project` and `block_gemm` of masknet.kernels.maskblock_gemm or batched GEMMs.

Legend: N candidates, K blocks, t units of a mask, z width of what is masked, h block width.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Self

import torch
from torch import nn

from masknet.folding.blocks import FoldedBlock, Hidden
from masknet.kernels import dispatch
from masknet.kernels.limits import BLOCK_KINDS, align_rows
from masknet.norms.base import RowNorm


class Form(NamedTuple):
    """What blocks must have in common."""

    kind: str
    eps: float
    activation: str
    weight: torch.Size
    second: torch.Size


Slot = tuple[str, list[nn.Module], str]  # a stack's name, the owners of its parts, and their name for them


class GroupedBlocks(nn.Module):
    """The weights of blocks of one form, each kind of them stacked; the blocks' own become views of these.

    Args:
        blocks: K of them, with masks and W.
        form: theirs.
    """

    second_weight: torch.Tensor
    second_bias: torch.Tensor
    linear_weight: torch.Tensor
    linear_bias: torch.Tensor | None
    norm_scale: torch.Tensor | None
    norm_shift: torch.Tensor | None

    def __init__(self, blocks: Sequence[FoldedBlock], form: Form) -> None:
        super().__init__()
        self.form, self.first_reader = form, blocks[0].reader
        self._slots: list[Slot] = []
        for slot in ("second", "linear", "norm"):
            for name in ("scale", "shift") if slot == "norm" else ("weight", "bias"):
                self._slots.append((f"{slot}_{name}", [getattr(block, slot) for block in blocks], name))
        for stack, owners, name in self._slots:
            self.register_buffer(stack, _stacked([getattr(owner, name) for owner in owners], one=name == "scale"))
        self._link()

    def _link(self) -> None:
        """Make what the blocks have views of the stacks, and those of matrices such as kernels like to read."""
        for stack, owners, name in self._slots:
            if name == "weight":
                setattr(self, stack, align_rows(getattr(self, stack)))
            for k, owner in enumerate(owners):
                if getattr(owner, name) is not None:
                    setattr(owner, name, getattr(self, stack)[k])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._link()
        return self

    def takes(self, x_ND: torch.Tensor, hidden: Hidden) -> dispatch.Together | None:
        """How the blocks of this input are computed together, if they are; autocast, which mixes types, is torch's."""
        if hidden.whole_NT is None or not hidden.whole_NT.dtype == x_ND.dtype == self.linear_weight.dtype:
            return None
        return dispatch.blocks_together(x_ND, self.form.weight[0])

    def by_kernels(self, x_ND: torch.Tensor, hidden: Hidden) -> torch.Tensor:
        """Outputs of all blocks [N, K·h] of what is masked and of the first layers, where those are in one tensor."""
        hidden_NT = self._hidden(hidden)
        masked_NKz = dispatch.mask_project(hidden_NT, self.second_weight, self.second_bias, x_ND)
        weights = (self.linear_weight, self.linear_bias, self.norm_scale, self.norm_shift)
        return dispatch.block_gemm(masked_NKz, *weights, *self.form[:3])

    def batched(self, blocks: Iterable[nn.Module], x_ND: torch.Tensor, hidden: Hidden) -> torch.Tensor:
        """The same with one GEMM for all masks and one for all W; norms and activations are the blocks' own."""
        K, _, units = self.second_weight.shape
        hidden_KNt = torch.unflatten(self._hidden(hidden), 1, (K, units)).transpose(0, 1)
        masked_KNz = torch.baddbmm(self.second_bias[:, None], hidden_KNt, self.second_weight.mT).mul_(x_ND)
        if self.linear_bias is None:
            z_KNh = torch.bmm(masked_KNz, self.linear_weight.mT)
        else:
            z_KNh = torch.baddbmm(self.linear_bias[:, None], masked_KNz, self.linear_weight.mT)
        outs: list[torch.Tensor] = []
        for block, z_Nh in zip(blocks, z_KNh, strict=True):
            assert isinstance(block, FoldedBlock)
            outs.append(block.behind_product(z_Nh, hidden))
        return torch.cat(outs, 1)

    def _hidden(self, hidden: Hidden) -> torch.Tensor:
        """What the first layers of the blocks' masks give, [N, K·t]."""
        assert hidden.whole_NT is not None
        start = sum(part.shape[1] for part in hidden.parts[: self.first_reader])
        blocks, _, units = self.second_weight.shape
        return hidden.whole_NT[:, start : start + blocks * units]


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
        if not isinstance(norm, RowNorm) or norm.kind not in BLOCK_KINDS:
            return None
        kind, eps = norm.kind, norm.eps
    return Form(kind, eps, block.activation, block.linear.weight.shape, block.second.weight.shape)


def _stacked(parts: Sequence[torch.Tensor | None], *, one: bool) -> torch.Tensor | None:
    """What there is in one tensor, with ones or zeros for what there is not; None for nothing at all."""
    like = next((part for part in parts if part is not None), None)
    if like is None:
        return None
    neutral = torch.ones_like(like) if one else torch.zeros_like(like)
    return torch.stack([neutral if part is None else part for part in parts])
