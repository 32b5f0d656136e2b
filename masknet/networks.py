"""SerialMaskNet and ParallelMaskNet over an embedding [B, F, d]: everything of the model but its tables."""

import torch
from torch import nn

from masknet.blocks import InstanceGuidedMask, MaskBlock
from masknet.config import MaskNetConfig
from masknet.norms import make_norm
from masknet.norms.none import NoNorm


def _block(config: MaskNetConfig, embedding_width: int, input_width: int) -> MaskBlock:
    mask = InstanceGuidedMask(embedding_width, input_width, config.reduction_ratio)
    norm = make_norm(config.hidden_norm.name, (config.block_width,), eps=config.hidden_norm.eps)
    return MaskBlock(mask, input_width, config.block_width, norm, config.dropout)


def _embedding_norm(config: MaskNetConfig, num_fields: int, raw: tuple[int, ...]) -> nn.Module:
    normed = [field for field in range(num_fields) if field not in raw]
    if not normed:
        return NoNorm((num_fields, config.embedding_dim), eps=config.embedding_norm.eps)
    norm = make_norm(config.embedding_norm.name, (len(normed), config.embedding_dim), eps=config.embedding_norm.eps)
    return PartialNorm(norm, normed) if raw else norm


class PartialNorm(nn.Module):
    """A norm of some of the fields of [B, F, d]; the others pass through as they are."""

    def __init__(self, norm: nn.Module, fields: list[int]) -> None:
        super().__init__()
        self.norm = norm
        self.fields: torch.Tensor
        self.register_buffer("fields", torch.tensor(fields), persistent=False)

    def forward(self, x_BFd: torch.Tensor, instance: torch.Tensor | None = None) -> torch.Tensor:
        """x with the chosen fields normalized; `instance` is for norms that condition on the raw embedding."""
        normed_BNd = self.norm(x_BFd.index_select(1, self.fields), instance=instance)
        return x_BFd.index_copy(1, self.fields, normed_BNd)


class SerialMaskNet(nn.Module):
    """Blocks in a row: the first masks LN_EMB of the embedding, each later one the output of the one before."""

    def __init__(self, config: MaskNetConfig, num_fields: int, raw: tuple[int, ...] = ()) -> None:
        super().__init__()
        embedding_width = num_fields * config.embedding_dim
        widths = [embedding_width] + [config.block_width] * (config.blocks - 1)
        self.embedding_norm = _embedding_norm(config, num_fields, raw)
        self.blocks = nn.ModuleList(_block(config, embedding_width, width) for width in widths)
        self.logit = nn.Linear(config.block_width, 1)

    def forward(self, emb_BFd: torch.Tensor) -> torch.Tensor:
        """Logits [B]."""
        raw_BD = emb_BFd.flatten(1)
        x_Bz = self.embedding_norm(emb_BFd, instance=raw_BD).flatten(1)
        for block in self.blocks:
            x_Bz = block(x_Bz, raw_BD)
        logit_B: torch.Tensor = self.logit(x_Bz).squeeze(-1)
        return logit_B


class ParallelMaskNet(nn.Module):
    """Blocks side by side on LN_EMB of the embedding, concatenated, then a ReLU MLP and a linear logit."""

    def __init__(self, config: MaskNetConfig, num_fields: int, raw: tuple[int, ...] = ()) -> None:
        super().__init__()
        embedding_width = num_fields * config.embedding_dim
        self.embedding_norm = _embedding_norm(config, num_fields, raw)
        self.blocks = nn.ModuleList(_block(config, embedding_width, embedding_width) for _ in range(config.blocks))
        layers: list[nn.Module] = []
        width = config.blocks * config.block_width
        for next_width in config.head:
            layers += [nn.Linear(width, next_width), nn.ReLU(), nn.Dropout(config.dropout)]
            width = next_width
        self.head = nn.Sequential(*layers)
        self.logit = nn.Linear(width, 1)

    def forward(self, emb_BFd: torch.Tensor) -> torch.Tensor:
        """Logits [B]."""
        raw_BD = emb_BFd.flatten(1)
        normed_BD = self.embedding_norm(emb_BFd, instance=raw_BD).flatten(1)
        hidden_BKh = torch.cat([block(normed_BD, raw_BD) for block in self.blocks], dim=1)
        logit_B: torch.Tensor = self.logit(self.head(hidden_BKh)).squeeze(-1)
        return logit_B


def build_network(config: MaskNetConfig, num_fields: int, raw: tuple[int, ...] = ()) -> SerialMaskNet | ParallelMaskNet:
    """The network that `config` describes, for embeddings [B, num_fields, embedding_dim].

    Args:
        config: the network's shape.
        num_fields: F.
        raw: places in F of the fields that LN_EMB leaves as they are.
    """
    return (SerialMaskNet if config.kind == "serial" else ParallelMaskNet)(config, num_fields, raw)
