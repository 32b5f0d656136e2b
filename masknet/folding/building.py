"""The steps of folding, part by part; `masknet.folding.fold` puts them in a row.

Legend: D width of the raw embedding, z of a block's input, t units of a mask, T of all first layers, h block width.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from masknet.activations import ACTIVATIONS
from masknet.blocks import InstanceGuidedMask, MaskBlock, MaskOnlyBlock, effective_weight
from masknet.folding.algebra import Matrix, beside_a_mask, past_relu
from masknet.folding.blocks import FirstLayers, FoldedBlock
from masknet.folding.explanation import FOLDED, Explanation, Note
from masknet.folding.norms import FoldedConditional, FoldedNorm, HiddenRMS, WholeNorm
from masknet.folding.packed import PackedLinear
from masknet.networks import PartialNorm
from masknet.norms.base import Affine, Norm
from masknet.norms.layer import ConditionalLayerNorm, LayerNorm
from masknet.norms.none import NoNorm
from masknet.norms.rms import RMSNorm


class Builder:
    """What is shared while a network is folded: the order of D, the first layers, and the notes.

    Args:
        columns: places in D of the context's columns, then of the candidates'.
        context_width: how many of them are the context's.
    """

    def __init__(self, columns: torch.Tensor, context_width: int) -> None:
        self.columns, self.context_width = columns, context_width
        self.notes = Explanation()
        self._readers: list[nn.Linear] = []

    def read(self, linear: nn.Linear) -> int:
        """Have a layer that reads the raw embedding, and a ReLU behind it, computed with the others; its place."""
        self._readers.append(linear)
        return len(self._readers) - 1

    def first_layers(self) -> FirstLayers | None:
        """All that was to be read."""
        if not self._readers:
            return None
        weights = [linear.weight.detach()[:, self.columns] for linear in self._readers]
        return FirstLayers(weights, [linear.bias.detach() for linear in self._readers], self.context_width)

    def note_first_layers(self) -> None:
        """Say it before all else."""
        if not self._readers:
            return
        units = sum(linear.out_features for linear in self._readers)
        text = f"{len(self._readers)} layers on the raw embedding: one of {units} units, before all blocks"
        self.notes.notes.insert(0, Note("first layers", FOLDED, text))
        if self.context_width:
            text = f"their {self.context_width} columns of the context: once per request"
            self.notes.notes.insert(1, Note("first layers", FOLDED, text))

    def block(
        self, place: str, block: MaskBlock | MaskOnlyBlock, owed: Affine | None, *, wide: bool, moves: str
    ) -> tuple[FoldedBlock, Affine | None]:
        """A block folded, and what its output is owed.

        Args:
            place: its name in the notes.
            block: the block.
            owed: what its input is owed; beside a mask a scale alone.
            wide: whether its input has the columns of D.
            moves: where γ of its norm may go past a ReLU: "linear" if a linear layer reads the output, "mask" if it
                meets a mask, "" for nowhere.
        """
        second = self.second(block.mask, owed, wide=wide)
        reader = self.read(block.mask.aggregate) if isinstance(block.mask, InstanceGuidedMask) else 0
        if isinstance(block, MaskOnlyBlock):
            self.notes.kept(place, "the product with the mask: there is nothing else")
            return FoldedBlock(second, reader, None, FoldedNorm(None, None), "none"), None
        matrix = Matrix(effective_weight(block.linear).detach(), None)
        if wide:
            matrix.weight = matrix.weight[:, self.columns]
        if second is None and owed is not None:
            matrix.take_inputs(owed)
        activation = activation_name(block.activation)
        norm, left = self.hidden_norm(place, matrix, block.norm, moves if activation == "relu" else "")
        return FoldedBlock(second, reader, packed(matrix), norm, activation), left

    def second(self, mask: nn.Module, owed: Affine | None, *, wide: bool) -> PackedLinear | None:
        """The second layer of a mask, with the scale that its product is owed; None for no mask."""
        if not isinstance(mask, InstanceGuidedMask):
            return None
        matrix = Matrix(mask.project.weight.detach(), mask.project.bias.detach())
        if wide:
            matrix = Matrix(matrix.weight[self.columns], mask.project.bias.detach()[self.columns])
        if owed is not None:
            matrix.scale_outputs(owed.scale)
        return packed(matrix)

    def hidden_norm(self, place: str, matrix: Matrix, norm: Norm, moves: str) -> tuple[FoldedNorm, Affine | None]:
        """What is left of the norm behind `matrix`, which is rewritten, and what the ReLU's output is owed."""
        affine = norm.fold()
        if affine is not None:
            if not isinstance(norm, NoNorm):
                matrix.scale_outputs(affine.scale)
                matrix.shift_outputs(affine.shift)
                self.notes.folded(place, f"{name(norm)}: γ and statistics into W, β into its bias; nothing is left")
            return FoldedNorm(None, None, overwrite=True), None
        affine = norm.separated()
        if affine is None:
            return self.unfolded(place, norm), None
        core: Norm = copy.deepcopy(norm)
        if isinstance(norm, LayerNorm):
            matrix.centre_outputs()
            core = RMSNorm(norm.shape, eps=norm.eps).to(matrix.weight)
            self.notes.folded(place, "layer: its centring into W, so that rms is left")
        self.notes.kept(place, f"{name(core)}: looks at every row")
        return self._past_relu(place, matrix, core, affine, moves, centred=isinstance(norm, LayerNorm))

    def unfolded(self, place: str, norm: Norm) -> FoldedNorm:
        """A norm without an affine that is the same for all rows."""
        if isinstance(norm, ConditionalLayerNorm):
            return self.conditional(place, norm, norm)
        self.notes.kept(place, f"{name(norm)}: its scale depends on the row")
        return WholeNorm(copy.deepcopy(norm))

    def conditional(self, place: str, norm: ConditionalLayerNorm, whole: Norm) -> FoldedConditional:
        """A conditional layer norm, of all fields of `whole` or, for those that it adds, the identity."""
        self.notes.folded(place, "conditional: its first layer joins the masks', γ and β the bias of its second")
        self.notes.kept(place, "conditional: layer statistics and the row's own affine")
        project, base = norm.project, torch.stack([norm.weight, norm.bias])
        weight = torch.unflatten(project.weight, 0, (2, *norm.shape))
        bias = torch.unflatten(project.bias, 0, (2, *norm.shape)) + base
        core: Norm = LayerNorm(norm.shape, eps=norm.eps).to(weight)
        if isinstance(whole, PartialNorm):  # the other fields get 1 and 0
            shape, fields = whole.shape, whole.fields
            core = PartialNorm(core, fields.tolist(), shape[0])
            bias = torch.stack([bias.new_ones(shape), bias.new_zeros(shape)]).index_copy(1, fields, bias)
            weight = weight.new_zeros(2, *shape, weight.shape[-1]).index_copy(1, fields, weight)
        matrix = Matrix(weight.flatten(0, -2).detach(), bias.flatten().detach())
        return FoldedConditional(core, packed(matrix), self.read(norm.aggregate))

    def _past_relu(
        self, place: str, matrix: Matrix, core: Norm, affine: Affine, moves: str, *, centred: bool
    ) -> tuple[FoldedNorm, Affine | None]:
        moved = past_relu(affine) if moves else None
        reason = _reason_to_keep(core, affine, moves)
        if moved is None or reason:
            if bool((affine.scale != 1).any()):
                self.notes.kept(place, f"γ: {reason or 'β over γ would be too large'}")
            return _hidden(core, affine, centred), None
        matrix.scale_outputs(moved.sign)
        self.notes.folded(place, f"γ: past the ReLU into the next {_NEXT[moves]}, its signs into W, β over |γ|")
        centred = centred and bool((moved.sign > 0).all())
        return _hidden(core, Affine(torch.ones_like(moved.sign), moved.shift), centred), moved.owed


def _hidden(core: Norm, affine: Affine, centred: bool) -> FoldedNorm:
    if isinstance(core, RMSNorm):
        return HiddenRMS(core, affine, centred=centred)
    return FoldedNorm(core, affine, overwrite=True)


_NEXT = {"linear": "linear layer", "mask": "mask's second layer"}


def _reason_to_keep(core: Norm, affine: Affine, moves: str) -> str:
    if not moves:
        return "what follows is no ReLU into a layer of its own"
    if moves == "mask" and bool((affine.scale == 0).any()):
        return "a channel of γ = 0 is a constant, which a mask's second layer cannot take"
    if not core.odd and bool((affine.scale < 0).any()):
        return f"{name(core)} does not let the sign of a negative γ through"
    return ""


def at_masks(owed: Affine | None) -> tuple[Affine | None, Affine | None]:
    """What masks' second layers take of what their product is owed, and what is left."""
    if owed is None:
        return None, None
    scale, left = beside_a_mask(owed)
    return Affine(scale, torch.zeros_like(scale)), left


def take(linear: nn.Linear, inputs: torch.Tensor, owed: Sequence[Affine | None]) -> Matrix:
    """A linear layer that reads streams of one width side by side, with what each is owed.

    Args:
        linear: the layer.
        inputs: which of its columns each entry of the streams meets.
        owed: of each stream.
    """
    matrix = Matrix(linear.weight.detach()[:, inputs], linear.bias.detach())
    one = matrix.weight.new_ones(len(inputs) // len(owed))
    affines = [each or Affine(one, torch.zeros_like(one)) for each in owed]
    matrix.take_inputs(Affine(torch.cat([each.scale for each in affines]), torch.cat([each.shift for each in affines])))
    return matrix


def packed(matrix: Matrix) -> PackedLinear:
    """The layer."""
    return PackedLinear(matrix.weight.contiguous().clone(), matrix.bias)


def activation_name(activation: nn.Module) -> str:
    """Its name in `ACTIVATIONS`, or "none"."""
    return next((key for key, kind in ACTIVATIONS.items() if type(activation) is kind), "none")


def name(norm: Norm) -> str:
    """What configurations call it."""
    from masknet.norms import NORMS

    return next((key for key, kind in NORMS.items() if type(norm) is kind), type(norm).__name__)
