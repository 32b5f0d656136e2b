"""Sizes of the tests for a GPU; without one they run small, in Triton's interpreter, so that they are not dead letters.

Legend: F fields, d embedding width, h block width.
"""

from typing import Any

import torch

from masknet.config import MaskNetConfig
from masknet.networks import Network, build_network
from masknet.norms.base import Norm

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
F, d, h = (39, 10, 400) if CUDA else (3, 4, 8)
CONTEXT = range(20 if CUDA else 1)


def network_of(
    norm: str | dict[str, Any] = "layer", kind: str = "parallel", hidden_norm: str | dict[str, Any] | None = None
) -> Network:
    """A network of the usual shape, or a small one without CUDA, with norms' parameters away from 1 and 0.

    Args:
        norm: LN_EMB, and LN_HID where that is not given.
        kind: of network.
        hidden_norm: LN_HID.
    """
    torch.manual_seed(0)
    config = MaskNetConfig(
        kind=kind,
        embedding_dim=d,
        blocks=3 if CUDA else 2,
        block_width=h,
        embedding_norm=norm,
        hidden_norm=norm if hidden_norm is None else hidden_norm,
        head=(h,) if kind == "parallel" else (),
    )
    network = build_network(config, F)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, Norm):
                for parameter in module.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return network.to(DEVICE)


def embeddings(rows: int, seed: int = 1) -> torch.Tensor:
    """Raw embeddings [rows, F, d]."""
    return torch.randn(rows, F, d, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def request_of(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A context, candidates, and both as embeddings of all fields."""
    emb = embeddings(rows)
    emb[:, : len(CONTEXT)] = emb[:1, : len(CONTEXT)]
    return emb[:1, : len(CONTEXT)].flatten(1), emb[:, len(CONTEXT) :].flatten(1), emb
