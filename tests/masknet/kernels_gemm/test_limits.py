"""What the operators refuse is what the limits say, which need no Triton."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from masknet.kernels import limits
from masknet.kernels.embedding_norm_mask import embedding_norm_mask
from masknet.kernels.hidden_norm_act import hidden_norm_act
from masknet.kernels.maskblock_gemm import block_gemm, mask_project

ROOT = Path(__file__).parents[3]


def embedding(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.ones(1, 1, width, dtype=dtype)
    return embedding_norm_mask(x, x[0], None, None, None, "rms", 1e-6, 1.0)


def hidden(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.ones(1, width, dtype=dtype)
    return hidden_norm_act(x, None, None, None, "rms", 1e-6, 1.0, "none", 0.0, 0)


def block(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x, weight = torch.ones(1, 1, 1, dtype=dtype), torch.ones(1, width, 1, dtype=dtype)
    return block_gemm(x, weight, None, None, None, "rms", 1e-6, "none")


def project(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.ones(1, width, dtype=dtype)
    return mask_project(x[:, :1], torch.ones(1, width, 1, dtype=dtype), torch.zeros(1, width), x)


OPERATORS = {embedding: limits.WIDEST_FIELD, hidden: limits.WIDEST_HIDDEN, block: limits.WIDEST_GEMM}
by_name = {"ids": lambda operator: operator.__name__}


@pytest.mark.parametrize("operator", OPERATORS, **by_name)
def test_widest(operator: Callable[..., torch.Tensor]) -> None:
    out = operator(OPERATORS[operator])
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=str(OPERATORS[operator])):
        operator(OPERATORS[operator] + 1)


@pytest.mark.parametrize("operator", [*OPERATORS, project], **by_name)
def test_types(operator: Callable[..., torch.Tensor]) -> None:
    for dtype in limits.DTYPES:
        out = operator(4, dtype)
        torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-2, atol=0)
    with pytest.raises(TypeError, match="float64"):
        operator(4, torch.float64)


def test_no_triton_is_needed() -> None:
    program = "import sys; sys.modules['triton'] = None; import masknet.kernels.limits"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
