"""The products of MaskBlocks with their epilogues against cuBLAS, for serving.

Legend: N candidates, K blocks, D width of the embedding, t aggregation width, h block width.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby, product
from typing import Any

import torch
from torch.nn import functional

from masknet.kernels import dispatch
from masknet.norms.base import Formula
from training.bench.comparing import Case, Rivals
from training.bench.libraries import EPS

K, D, T, H = 3, 390, 780, 400
ROWS = {False: (1, 64, 500, 2048, 8192), True: (1,)}
DTYPES = {False: (torch.bfloat16, torch.float16, torch.float32), True: (torch.float32,)}
NAME, GEMMS = "maskblock_gemm", "gemms"


def gemm_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """mask_project and block_gemm of all blocks, with rms and a shift, as folding leaves of layer norm, and a ReLU."""
    for dtype, N in product(DTYPES[quick], ROWS[quick]):
        facts = {"kind": "rms", "N": N, "K": K, "D": D, "t": T, "h": H}
        facts["float32_products"] = torch.get_float32_matmul_precision()
        yield Case(NAME, facts, partial(_rivals, device, N, dtype), dtype)


@torch.no_grad()
def _rivals(device: torch.device, N: int, dtype: torch.dtype) -> Rivals:
    from masknet.kernels.limits import align_rows
    from masknet.kernels.maskblock_gemm import block_gemm, mask_project

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    hidden, bias, shift = normal(N, K * T), normal(K, D), normal(K, H)
    x = normal(N, D)  # context and candidates, which a folded network joins once
    # aligned, as a folded network holds them whoever multiplies
    project, weight = align_rows(normal(K, D, T) / T**0.5), align_rows(normal(K, H, D) / D**0.5)
    norms = [Formula("rms", None, shift_h) for shift_h in shift]

    def products() -> list[torch.Tensor]:
        parts = torch.split(hidden, T, dim=1)
        masked = [functional.linear(parts[k], project[k], bias[k]).mul_(x) for k in range(K)]
        return [functional.linear(masked[k], weight[k]) for k in range(K)]

    def eager() -> torch.Tensor:
        normed = [functional.rms_norm(out, (H,), eps=EPS) for out in products()]
        return torch.cat([out.add_(shift_h).relu_() for out, shift_h in zip(normed, shift, strict=True)], 1)

    def norm_act(outs: Iterable[torch.Tensor]) -> torch.Tensor:
        normed = [dispatch.hidden_norm_act(norm, out, EPS, "relu") for norm, out in zip(norms, outs, strict=True)]
        return torch.cat(normed, 1)

    def per_block() -> torch.Tensor:
        return norm_act(products())

    def batched() -> torch.Tensor:
        x_KND = torch.baddbmm(bias[:, None], hidden.view(N, K, T).transpose(0, 1), project.mT).mul_(x)
        return norm_act(torch.bmm(x_KND, weight.mT))

    def fused() -> torch.Tensor:
        x_NKD = mask_project(hidden, project, bias, x)
        out: torch.Tensor = block_gemm(x_NKD, weight, None, None, shift, "rms", EPS, "relu")
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
