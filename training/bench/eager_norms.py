"""The norms without kernels, on a CPU.

Legend: B rows, F fields, d embedding width, h width of a hidden vector.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import nn

from masknet.norms import make_norm
from training.bench.comparing import Case, Rivals
from training.bench.libraries import EPS
from training.bench.row_kernels import PASSES, F, normal, one_pass

D_FIELD, H = 10, 400
BATCHES = {False: (500, 8192), True: (64,)}  # by `quick`


def eager_norm_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """LN_EMB of all fields at once against one nn.LayerNorm for each, and LN_HID with its ReLU."""
    for B, backward in product(BATCHES[quick], PASSES):
        facts = {"pass": PASSES[backward], "B": B}
        yield Case(
            "LN_EMB",
            {**facts, "F": F, "d": D_FIELD},
            partial(_embedding, device, B, backward),
            baseline="a norm per field",
            host=True,
        )
        yield Case("LN_HID and ReLU", {**facts, "h": H}, partial(_hidden, device, B, backward), host=True)


def _embedding(device: torch.device, B: int, backward: bool) -> Rivals:
    fields = nn.ModuleList(nn.LayerNorm(D_FIELD, EPS) for _ in range(F)).to(device)
    norm = make_norm("layer", (F, D_FIELD), eps=EPS).to(device)
    x = normal(device, torch.float32, B, F, D_FIELD)
    dout = torch.randn_like(x) if backward else None

    def per_field() -> torch.Tensor:
        return torch.stack([field(x[:, i]) for i, field in enumerate(fields)], 1)

    return {
        "a norm per field": one_pass(per_field, (x,), list(fields.parameters()), dout),
        "vectorized": one_pass(lambda: norm(x), (x,), list(norm.parameters()), dout),
    }


def _hidden(device: torch.device, B: int, backward: bool) -> Rivals:
    norm = make_norm("layer", (H,), eps=EPS).to(device)
    x = normal(device, torch.float32, B, H)
    dout = torch.randn_like(x) if backward else None
    return {"eager": one_pass(lambda: torch.relu(norm(x)), (x,), list(norm.parameters()), dout)}
