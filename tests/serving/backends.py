"""Networks, rows and records for the tests of fast backends.

Legend: N candidates, F fields, d embedding width.
"""

import copy

import numpy as np
import torch

from masknet.config import MaskNetConfig
from masknet.networks import Network, build_network
from masknet.norms import set_progress
from masknet.norms.base import Norm

F, DIM = 6, 8
CONTEXT = (4, 1)  # neither the first fields nor in order
ROWS = 4000


def network_of(config: dict[str, object], raw: tuple[int, ...] = (), seed: int = 0) -> Network:
    """Random weights, affines of norms too, so that nothing folds away; norms as they are after training."""
    torch.manual_seed(seed)
    base: dict[str, object] = {"embedding_dim": DIM, "block_width": 24, "blocks": 3, "reduction_ratio": 1.0}
    network = build_network(MaskNetConfig.model_validate({**base, **config}), F, raw)
    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, Norm):
                for parameter in norm.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
    set_progress(network, 1.0)
    return network.eval()


def embeddings(rows: int, seed: int) -> torch.Tensor:
    """[N, F, d] of fields whose sizes are far apart."""
    generator = torch.Generator().manual_seed(seed)
    sizes_F1 = torch.tensor([1.0, 0.3, 2.0, 0.05, 1.0, 0.5]).unsqueeze(1)
    return sizes_F1 * torch.randn(rows, F, DIM, generator=generator)


def exact(network: Network, emb_NFd: torch.Tensor) -> torch.Tensor:
    """Logits [N] in fp64 of the trained network, not folded."""
    with torch.no_grad():
        logit_N: torch.Tensor = copy.deepcopy(network).double()(emb_NFd.double())
    return logit_N


def apart(emb_NFd: torch.Tensor, context: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first row's context [1, C] and all rows' candidates [N, R]."""
    candidates = [field for field in range(emb_NFd.shape[1]) if field not in context]
    return emb_NFd[:1, list(context)].flatten(1), emb_NFd[:, candidates].flatten(1)


def auc_of(label_N: np.ndarray, score_N: np.ndarray) -> float:
    """The share of pairs of a click and none that are in order, ties counting half."""
    clicks, others = score_N[label_N > 0], score_N[label_N <= 0]
    right = (clicks[:, None] > others).sum() + 0.5 * (clicks[:, None] == others).sum()
    return float(right / (len(clicks) * len(others)))
