"""Blocks and whole networks: training steps, and ranking with the folded network against the trained one.

Legend: B rows, N candidates, F fields, d embedding width, C width of the context's embeddings, R of a candidate's.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Literal

import torch
from torch import nn

from masknet.config import MaskNetConfig
from masknet.folding import fold
from masknet.kernels import dispatch
from masknet.kernels.modes import Mode
from masknet.networks import Network, build_network
from masknet.norms.base import Norm
from training.bench.comparing import Case, Rivals
from training.bench.libraries import compiled
from training.bench.row_kernels import PASSES, F, Forward, normal, one_pass

D_FIELD, CONTEXT_FIELDS = 10, range(20)
Kind = Literal["parallel", "serial"]
TRAINING_ROWS = {False: 8192, True: 8}  # by `quick`
CUDA_CANDIDATES = {False: (1, 64, 500, 2048), True: (1,)}
CPU_CANDIDATES = {False: (1, 50, 500, 2000), True: (1, 50)}


class FirstBlock(nn.Module):
    """LN_EMB and the first MaskBlock of a network."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.embedding_norm, self.block = network.embedding_norm, network.blocks[0]

    def forward(self, emb_BFd: torch.Tensor) -> torch.Tensor:
        """Hidden vector [B, h]."""
        raw_BD = emb_BFd.flatten(1)
        out_Bh: torch.Tensor = self.block(dispatch.normed_embedding(self.embedding_norm, emb_BFd, raw_BD), raw_BD)
        return out_Bh


def network_of(kind: Kind) -> Network:
    """The paper's shape with random weights, affines of norms too: ones and zeros would fold to nothing."""
    head = (400,) if kind == "parallel" else ()
    network = build_network(MaskNetConfig(kind=kind, embedding_dim=D_FIELD, head=head), F)
    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, Norm):
                for parameter in norm.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def training_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Forward and backward pass of a MaskBlock and of a network with three in parallel; bf16 is by autocast."""
    for name, dtype in product(("MaskBlock", "network"), (torch.bfloat16, torch.float32)):
        facts = {"kind": "parallel", "pass": PASSES[True], "B": TRAINING_ROWS[quick], "F": F, "d": D_FIELD}
        rivals = partial(_training_rivals, device, name, TRAINING_ROWS[quick], dtype)
        yield Case(name, facts, rivals, dtype, host=True)


def serving_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Ranking on a GPU: the trained network, folded, with kernels, and replayed from a CUDA graph.

    auto and fused are values of MASKNET_KERNELS: fused has the products of blocks by kernels too.
    """
    for dtype, N in product((torch.bfloat16, torch.float32), CUDA_CANDIDATES[quick]):
        facts = {"kind": "parallel", "N": N, "F": F, "d": D_FIELD, "context_fields": len(CONTEXT_FIELDS)}
        yield Case("ranking", facts, partial(_serving_rivals, device, N, dtype), dtype, host=True)


def folding_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Ranking on a CPU: the trained network, folded, and folded with the context's fields apart.

    Folded products run in oneDNN, torch's own in MKL unless `torch.set_float32_matmul_precision` allows less than fp32
    (which oneDNN makes no use of here); "unfolded, oneDNN" shows what is not owed to folding.
    """
    kinds: tuple[Kind, ...] = ("parallel", "serial")
    for kind, N in product(kinds, CPU_CANDIDATES[quick]):
        facts = {"kind": kind, "N": N, "F": F, "d": D_FIELD, "context_fields": len(CONTEXT_FIELDS)}
        yield Case("ranking", facts, partial(_folding_rivals, device, kind, N), baseline="unfolded", host=True)


def _training_rivals(device: torch.device, name: str, B: int, dtype: torch.dtype) -> Rivals:
    network = network_of("parallel")
    module = (FirstBlock(network) if name == "MaskBlock" else network).to(device).train()
    emb = normal(device, torch.float32, B, F, D_FIELD)

    def forward(module: Callable[[torch.Tensor], torch.Tensor], mode: Mode) -> torch.Tensor:
        with dispatch.kernels(mode), torch.autocast(device.type, torch.bfloat16, dtype is torch.bfloat16):
            return module(emb)

    by_torch = compiled(module)
    forwards: dict[str, Forward] = {
        "eager": partial(forward, module, "eager"),
        "fused": partial(forward, module, "fused"),
        "compile": partial(forward, by_torch, "eager"),
        "compile, fused": partial(forward, by_torch, "fused"),
    }
    dout = torch.randn_like(forwards["eager"]())
    return {rival: one_pass(each, (emb,), list(module.parameters()), dout) for rival, each in forwards.items()}


def _request(device: torch.device, N: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw embeddings of a context [1, C] and of candidates [N, R]."""
    context = len(CONTEXT_FIELDS)
    return normal(device, dtype, 1, context * D_FIELD), normal(device, dtype, N, (F - context) * D_FIELD)


def _whole(context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
    """Both as rows of all fields [N, F·d]."""
    return torch.cat([context_1C.expand(candidates_NR.shape[0], -1), candidates_NR], 1)


def _serving_rivals(device: torch.device, N: int, dtype: torch.dtype) -> Rivals:
    from masknet.kernels.graphs import GraphRunner

    network = network_of("parallel").to(device, dtype).eval()
    folded = fold(network, CONTEXT_FIELDS)
    request = _request(device, N, dtype)

    def unfolded(mode: Mode) -> torch.Tensor:
        with dispatch.kernels(mode):
            logits: torch.Tensor = network(_whole(*request).view(-1, F, D_FIELD))
        return logits

    def ranked(ranker: Callable[..., torch.Tensor], mode: Mode) -> torch.Tensor:
        with dispatch.kernels(mode):
            return ranker(*request)

    forwards: dict[str, Forward] = {
        "eager": partial(unfolded, "eager"),
        "fused": partial(unfolded, "fused"),
        "folded": partial(ranked, folded, "eager"),
        "folded, auto": partial(ranked, folded, "auto"),
        "folded, fused": partial(ranked, folded, "fused"),
        "folded, auto, graph": partial(ranked, GraphRunner(folded), "auto"),
        "folded, fused, graph": partial(ranked, GraphRunner(folded), "fused"),
    }
    return {rival: one_pass(each, (), (), None) for rival, each in forwards.items()}


def _folding_rivals(device: torch.device, kind: Kind, N: int) -> Rivals:
    network = network_of(kind).to(device).eval()
    whole, split = fold(network), fold(network, CONTEXT_FIELDS)
    request = _request(device, N, torch.float32)
    nothing_10 = request[0][:, :0]

    def unfolded(network: Network, precision: str) -> torch.Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            logits: torch.Tensor = network(_whole(*request).view(-1, F, D_FIELD))
        finally:
            torch.set_float32_matmul_precision(before)
        return logits

    forwards: dict[str, Forward] = {
        "unfolded": partial(unfolded, network, "highest"),
        # with weights of its own, for else each would find the other's in the cache
        "unfolded, oneDNN": partial(unfolded, copy.deepcopy(network), "medium"),
        "folded": lambda: whole(nothing_10, _whole(*request)),
        "folded, context apart": lambda: split(*request),
    }
    return {rival: one_pass(each, (), (), None) for rival, each in forwards.items()}
