"""Removing the normalizations of a trained network: freeze each one's divisor in turn, fine-tune, fold what is left.

After Baroni et al., arXiv 2507.02559 (submarat/removing-layer-norm): a layer norm with a constant in place of the row's
deviation is a linear map. The constant is an exponential mean (0.9) over steps of the batch's mean deviation, one for a
hidden vector and one for each field; the blocks' norms are frozen first, in their order, LN_EMB last.
"""

import torch
from torch import nn

from masknet.blocks import MaskBlock, effective_weight
from masknet.config import MaskNetConfig
from masknet.networks import Network, PartialNorm
from masknet.norms.affine import AffineOnly
from masknet.norms.base import Affine, Norm
from masknet.norms.layer import LayerNorm
from masknet.norms.rms import RMSNorm
from masknet.norms.running import mean_over_rows

FIRST, LAST = 0.1, 0.6  # shares of training after which the first and the last norm are frozen
_KEEP = 0.9


class FreezingNorm(Norm):
    """A layer or RMS norm until the share `freeze_at` of training is done, then divided by a constant instead."""

    running_deviation: torch.Tensor
    frozen: torch.Tensor
    seen: torch.Tensor

    def __init__(self, norm: LayerNorm | RMSNorm, freeze_at: float) -> None:
        super().__init__(norm.shape, eps=norm.eps)
        self.centred, self.freeze_at = isinstance(norm, LayerNorm), freeze_at
        self.weight = norm.weight
        self.bias: torch.Tensor = nn.Parameter(torch.zeros(norm.shape)) if norm.bias is None else norm.bias
        self.register_buffer("running_deviation", torch.ones(*norm.shape[:-1], 1))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    def set_progress(self, done: float) -> None:
        """Freeze when its time has come; not before a step has told what to freeze at."""
        self.frozen.logical_or_(self.seen & (done >= self.freeze_at))

    @property
    def settled_from(self) -> float:
        """It is frozen from there on."""
        return self.freeze_at

    def normalize(self, x: torch.Tensor, instance: torch.Tensor | None) -> torch.Tensor:
        """x over its own deviation, or over the frozen one."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        deviation = (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        if self.training:
            self._follow(deviation.detach())
        divisor = torch.where(self.frozen, self.running_deviation, deviation)
        return x / divisor * self.weight + self.bias

    def _follow(self, deviation: torch.Tensor) -> None:
        rows, mean = mean_over_rows(deviation)
        keep = torch.where(self.seen, torch.full_like(mean, _KEEP), 0.0).masked_fill(self.frozen | (rows == 0), 1.0)
        self.running_deviation.copy_(torch.lerp(mean, self.running_deviation, keep))
        self.seen.logical_or_((rows > 0).squeeze())

    def remaining(self) -> Affine:
        """What the norm does beside centring: γ over the frozen deviation, and β."""
        if not bool(self.frozen):
            raise ValueError("a norm was not frozen before training ended")
        return Affine(self.weight.detach() / self.running_deviation, self.bias.detach())


def begin_removal(network: Network, config: MaskNetConfig) -> None:
    """Put freezing norms in the places of `network`'s layer and RMS norms.

    Raises:
        ValueError: a norm cannot be removed; the message names the slot.
    """
    if config.kind == "residual_serial":
        raise ValueError(
            "norms are removed from serial and parallel networks; a residual branch's have no W before them"
        )
    for slot, norm in (("embedding_norm", config.embedding_norm), ("hidden_norm", config.hidden_norm)):
        if norm.name not in ("layer", "rms", "none", "affine", "batch", "power_v", "power", "unified", "prepbn"):
            raise ValueError(
                f"{slot} {norm.name} has no divisor that could be frozen: only layer and rms have, and norms "
                "by running statistics go without a fine-tune"
            )
        if norm.parameters.get("group_scaling") is not None:
            raise ValueError(f"{slot} {norm.name} with group_scaling divides each row by a statistic of its own")
    places: list[tuple[nn.Module, str]] = [(block, "norm") for block in network.blocks if isinstance(block, MaskBlock)]
    places += [_embedding_place(network)]
    freezing = [(owner, name) for owner, name in places if isinstance(getattr(owner, name), LayerNorm | RMSNorm)]
    for index, (owner, name) in enumerate(freezing):
        freeze_at = FIRST + (LAST - FIRST) * index / max(1, len(freezing) - 1)
        setattr(owner, name, FreezingNorm(getattr(owner, name), freeze_at))


def finish_removal(network: Network, config: MaskNetConfig) -> MaskNetConfig:
    """Fold every norm of a fine-tuned `network` into an affine and, for centring, W; returns the shape it has then.

    Raises:
        ValueError: a norm was not frozen, or still depends on its input (prepbn before the end of its schedule).
    """
    blocks = [block for block in network.blocks if isinstance(block, MaskBlock)]
    for block in blocks:
        _fold_hidden(block)
    owner, name = _embedding_place(network)
    centred = _fold_embedding(owner, name)
    changes: dict[str, object] = {"weight_standardization": False}
    if blocks:
        changes["hidden_norm"] = {"name": "affine"}
    changes["embedding_norm"] = {"name": "affine", "centred": centred}
    return MaskNetConfig.model_validate({**config.model_dump(), **changes})


def _embedding_place(network: Network) -> tuple[nn.Module, str]:
    partial = network.embedding_norm
    return (partial, "norm") if isinstance(partial, PartialNorm) else (network, "embedding_norm")


@torch.no_grad()
def _fold_hidden(block: MaskBlock) -> None:
    old, norm = block.linear, block.norm
    weight = effective_weight(old).detach()
    if isinstance(norm, FreezingNorm) and norm.centred:
        weight = weight - weight.mean(0, keepdim=True)
    linear = nn.Linear(old.in_features, old.out_features, bias=False).to(weight)
    linear.weight.copy_(weight)
    block.linear, block.norm = linear, as_module(_remaining(norm), norm)


def as_module(affine: Affine, norm: Norm) -> AffineOnly:
    """An affine as a norm of its own."""
    module = AffineOnly(norm.shape, eps=norm.eps).to(affine.scale)
    module.load_state_dict({"weight": affine.scale, "bias": affine.shift})
    return module


def _fold_embedding(owner: nn.Module, name: str) -> bool:
    norm = getattr(owner, name)
    if isinstance(norm, AffineOnly):
        return norm.centred
    module = as_module(_remaining(norm), norm)
    module.centred = isinstance(norm, FreezingNorm) and norm.centred
    setattr(owner, name, module)
    return module.centred


def _remaining(norm: Norm) -> Affine:
    """What is left of a norm beside centring."""
    affine = norm.remaining() if isinstance(norm, FreezingNorm) else norm.fold()
    if affine is None:
        raise ValueError(f"{type(norm).__name__} is no affine yet: it has not come to the end of its schedule")
    return affine
