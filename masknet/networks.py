"""MaskNets over an embedding [B, F, d]: everything of the model but its tables."""

import torch
from torch import nn

from masknet.activations import ACTIVATIONS, initialize, make_dropout
from masknet.blocks import InstanceGuidedMask, MaskBlock, MaskOnlyBlock, NoMask
from masknet.config import MaskNetConfig
from masknet.kernels.dispatch import normed, normed_embedding
from masknet.kernels.products import Linear, narrowed, unnarrowed
from masknet.norms import make_norm
from masknet.norms.base import Affine, Norm
from masknet.norms.none import NoNorm
from masknet.residual import ResidualBlock, hidden_norm, places


def _mask(config: MaskNetConfig, embedding_width: int, masked_width: int) -> nn.Module:
    if not config.mask:
        return NoMask()
    return InstanceGuidedMask(embedding_width, masked_width, config.reduction_ratio)


def _block(config: MaskNetConfig, embedding_width: int, input_width: int) -> MaskBlock | MaskOnlyBlock:
    mask = _mask(config, embedding_width, input_width)
    if not config.feed_forward:
        return MaskOnlyBlock(mask)
    return MaskBlock(
        mask,
        input_width,
        config.block_width,
        hidden_norm(config, embedding_width),
        config.dropout,
        activation=config.activation,
        weight_standardization=config.weight_standardization,
    )


def _embedding_norm(config: MaskNetConfig, num_fields: int, raw: tuple[int, ...]) -> Norm:
    slot, dim = config.embedding_norm, config.embedding_dim
    normed = [field for field in range(num_fields) if field not in raw]
    if not normed:
        return NoNorm((num_fields, dim), eps=slot.eps)
    norm = make_norm(slot.name, (len(normed), dim), instance_width=num_fields * dim, **slot.parameters)
    return PartialNorm(norm, normed, num_fields) if raw else norm


class PartialNorm(Norm):
    """A norm of some of the fields of [B, F, d]; the others pass through as they are."""

    def __init__(self, norm: Norm, fields: list[int], num_fields: int) -> None:
        super().__init__((num_fields, norm.shape[-1]), eps=norm.eps)
        self.norm = norm
        self.fields: torch.Tensor
        self.register_buffer("fields", torch.tensor(fields), persistent=False)
        # fields beside each other need no gathering
        self._run = (fields[0], fields[-1] + 1) if fields == list(range(fields[0], fields[-1] + 1)) else None

    def forward(self, x_BFd: torch.Tensor, instance: torch.Tensor | None = None) -> torch.Tensor:
        """x with the chosen fields normalized; `instance` is for norms that condition on the raw embedding."""
        normed_BNd = self.norm(x_BFd.index_select(1, self.fields), instance=instance)
        return x_BFd.index_copy(1, self.fields, normed_BNd)

    def fold(self) -> Affine | None:
        return self._spread(self.norm.fold())

    def core(self, x: torch.Tensor) -> torch.Tensor:
        """The core of the chosen fields; the others as they are."""
        if self._run is None:
            return x.index_copy(1, self.fields, self.norm.core(x.index_select(1, self.fields)))
        start, stop = self._run
        return torch.cat([x[:, :start], self.norm.core(x[:, start:stop]), x[:, stop:]], 1)

    def separated(self) -> Affine | None:
        return self._spread(self.norm.separated())

    def _spread(self, inner: Affine | None) -> Affine | None:
        """The affine of the chosen fields as one of all fields."""
        if inner is None:
            return None
        scale, shift = inner.scale.new_ones(self.shape), inner.scale.new_zeros(self.shape)
        return Affine(scale.index_copy(0, self.fields, inner.scale), shift.index_copy(0, self.fields, inner.shift))


class SerialMaskNet(nn.Module):
    """Blocks in a row: the first masks LN_EMB of the embedding, each later one the output of the one before.

    With kind residual_serial the later blocks add to what they read (`masknet.residual`).
    """

    def __init__(self, config: MaskNetConfig, num_fields: int, raw: tuple[int, ...] = ()) -> None:
        super().__init__()
        big = num_fields * config.embedding_dim
        self.embedding_norm = _embedding_norm(config, num_fields, raw)
        width = config.block_width if config.feed_forward else big
        blocks: list[nn.Module] = [_block(config, big, big)]
        if config.kind == "residual_serial":
            blocks += [
                ResidualBlock(config, _mask(config, big, width), big, place, depth)
                for depth, place in enumerate(places(config), start=2)
            ]
        else:
            blocks += [_block(config, big, width) for _ in range(config.blocks - 1)]
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = hidden_norm(config, big, used=config.placement in ("pre", "peri", "mix"))
        self.logit = nn.Linear(width, 1)

    def forward(self, emb_BFd: torch.Tensor) -> torch.Tensor:
        """Logits [B]."""
        raw_BD = narrowed(emb_BFd.flatten(1))
        x_Bz = normed_embedding(self.embedding_norm, emb_BFd, raw_BD)
        for block in self.blocks:
            x_Bz = block(x_Bz, raw_BD)
        assert isinstance(x_Bz, torch.Tensor)  # since the first block has multiplied
        return unnarrowed(self.logit, normed(self.final_norm, x_Bz, raw_BD)).squeeze(-1)


class ParallelMaskNet(nn.Module):
    """Blocks side by side on LN_EMB of the embedding, concatenated, then an MLP and a linear logit."""

    def __init__(self, config: MaskNetConfig, num_fields: int, raw: tuple[int, ...] = ()) -> None:
        super().__init__()
        embedding_width = num_fields * config.embedding_dim
        self.embedding_norm = _embedding_norm(config, num_fields, raw)
        self.blocks = nn.ModuleList(_block(config, embedding_width, embedding_width) for _ in range(config.blocks))
        layers: list[nn.Module] = []
        width = config.blocks * (config.block_width if config.feed_forward else embedding_width)
        for next_width in config.head:
            layers += [
                initialize(Linear(width, next_width), config.activation),
                ACTIVATIONS[config.activation](),
                make_dropout(config.activation, config.dropout),
            ]
            width = next_width
        self.head = nn.Sequential(*layers)
        self.logit = nn.Linear(width, 1)

    def forward(self, emb_BFd: torch.Tensor) -> torch.Tensor:
        """Logits [B]."""
        raw_BD = narrowed(emb_BFd.flatten(1))
        normed_BD = normed_embedding(self.embedding_norm, emb_BFd, raw_BD)
        hidden_BKh = torch.cat([block(normed_BD, raw_BD) for block in self.blocks], dim=1)
        return unnarrowed(self.logit, self.head(hidden_BKh)).squeeze(-1)


Network = SerialMaskNet | ParallelMaskNet


def build_network(config: MaskNetConfig, num_fields: int, raw: tuple[int, ...] = ()) -> Network:
    """The network that `config` describes, for embeddings [B, num_fields, embedding_dim].

    Args:
        config: the network's shape.
        num_fields: F.
        raw: places in F of the fields that LN_EMB leaves as they are.

    Raises:
        ValueError: a layer would have no units, or a norm's groups do not divide its width.
    """
    return (ParallelMaskNet if config.kind == "parallel" else SerialMaskNet)(config, num_fields, raw)
