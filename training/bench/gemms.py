"""The products of MaskBlocks with their epilogues against cuBLAS, for serving.

Legend: N candidates, K blocks, D width of the embedding, C of it the context's, R the candidate's, t aggregation width,
h block width.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby, product
from typing import Any

import torch
from torch.nn import functional

from masknet.kernels import dispatch
from masknet.norms.base import Formula
from training.bench.comparing import Case, Rivals
from training.bench.libraries import EPS

K, D, C, T, H = 3, 390, 200, 780, 400
ROWS = {False: (1, 64, 500, 2048, 8192), True: (1,)}
DTYPES = {False: (torch.bfloat16, torch.float16, torch.float32), True: (torch.float32,)}
NAME, GEMMS = "maskblock_gemm", "gemms"


def gemm_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """mask_project and block_gemm of all blocks, a layer norm without an affine and a ReLU behind."""
    for dtype, N in product(DTYPES[quick], ROWS[quick]):
        facts = {"kind": "layer", "N": N, "K": K, "C": C, "R": D - C, "t": T, "h": H}
        facts["float32_products"] = torch.get_float32_matmul_precision()
        yield Case(NAME, facts, partial(_rivals, device, N, dtype), dtype)


@torch.no_grad()
def _rivals(device: torch.device, N: int, dtype: torch.dtype) -> Rivals:
    from masknet.kernels.maskblock_gemm import align_rows, block_gemm, mask_project

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    hidden, context, candidates = normal(N, K * T), normal(C), normal(N, D - C)
    project, bias, weight = normal(K, D, T) / T**0.5, normal(K, D), normal(K, H, D) / D**0.5
    aligned_project, aligned_weight = align_rows(project), align_rows(weight)
    core = Formula("layer", None)

    def masked(k: int, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden[:, k * T : (k + 1) * T], project[k], bias[k]).mul_(x)

    def whole() -> torch.Tensor:
        return torch.cat([context.expand(N, -1), candidates], 1)

    def eager() -> torch.Tensor:
        x = whole()
        outs = [functional.linear(masked(k, x), weight[k]) for k in range(K)]
        return torch.cat([functional.layer_norm(out, (H,), eps=EPS).relu_() for out in outs], 1)

    def per_block() -> torch.Tensor:
        x = whole()
        outs = [functional.linear(masked(k, x), weight[k]) for k in range(K)]
        return torch.cat([dispatch.hidden_norm_act(core, out, EPS, "relu") for out in outs], 1)

    def batched() -> torch.Tensor:
        x_KND = torch.baddbmm(bias[:, None], hidden.view(N, K, T).transpose(0, 1), project.mT).mul_(whole())
        out_KNh = torch.bmm(x_KND, weight.mT)
        out = dispatch.hidden_norm_act(core, out_KNh.flatten(0, 1), EPS, "relu")
        return out.view(K, N, H).transpose(0, 1).reshape(N, K * H)

    def fused() -> torch.Tensor:
        x_NKD = mask_project(hidden, aligned_project, bias, context, candidates)
        out: torch.Tensor = block_gemm(x_NKD, aligned_weight, None, None, None, None, "layer", EPS, 1.0, "relu")
        return out

    calls = {"eager": eager, "cublas per block": per_block, "cublas batched": batched, GEMMS: fused}
    return {name: torch.no_grad()(call) for name, call in calls.items()}


def measured_gemms(rows: Sequence[dict[str, Any]], capability: tuple[int, int]) -> str:
    """`dispatch.MEASURED_GEMMS` as the benchmark's rows have it, a line to paste."""
    ours = [row for row in rows if row["name"] == NAME]
    found = {}
    for dtype, group in groupby(ours, key=lambda row: row["dtype"]):
        best: dict[int, dict[str, float]] = {}
        for row in group:
            best.setdefault(row["N"], {})[row["rival"]] = row["p50"]
        faster = [_is_faster(times) for _, times in sorted(best.items())]
        span = longest_run(faster)
        if span is not None:
            sizes = sorted(best)
            found[dtype] = (sizes[span[0]], sizes[span[1]])
    entries = ", ".join(f"({capability}, torch.{dtype}): {span}" for dtype, span in found.items())
    return f"MEASURED_GEMMS = {{{entries}}}"


def _is_faster(times: dict[str, float]) -> bool:
    return GEMMS in times and all(times[GEMMS] < p50 for rival, p50 in times.items() if rival != GEMMS)


def longest_run(flags: Sequence[bool]) -> tuple[int, int] | None:
    """First and last place of the longest run of true flags, the first of several; None where there is none."""
    best: tuple[int, int] | None = None
    for flag, group in groupby(enumerate(flags), key=lambda item: item[1]):
        places = [place for place, _ in group]
        if flag and (best is None or places[-1] - places[0] > best[1] - best[0]):
            best = places[0], places[-1]
    return best
