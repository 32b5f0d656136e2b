"""The operators against their formulas in fp64 at the sizes of a request and of a batch.

Legend: B rows, N candidates, F fields, d embedding width, h width of a hidden vector.
"""

import pytest
import torch

from masknet.kernels.maskblock_gemm import block_gemm, mask_project
from masknet.kernels.rows import KINDS
from tests.gpu.settings import CUDA, F, d, h
from tests.masknet.kernels import test_embedding_norm_mask as embedding
from tests.masknet.kernels import test_hidden_norm_act as hidden
from tests.masknet.kernels import test_power_norm_act as power
from tests.masknet.kernels_gemm import test_maskblock_gemm as gemm

batches = pytest.mark.parametrize("B", [500, 8192] if CUDA else [5])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16] if CUDA else [torch.bfloat16])


@batches
@dtypes
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "seednorm"])
def test_embedding_norm_mask(kind: str, dtype: torch.dtype, B: int) -> None:
    inputs = embedding.make_inputs((B, F, d), kind, precision=(dtype, dtype, torch.float32))
    if kind == "l1":
        keep_off_the_kink(inputs[0])
    embedding.compare(kind, inputs)


def keep_off_the_kink(x: torch.Tensor | None) -> None:
    """Replace fields with an entry at their mean, where |x − mean| has two slopes and rounding decides on which.

    Numbers of 16 bits are coarse enough for that to happen among some hundred thousand fields.
    """
    assert x is not None
    centred = x.double() - x.double().mean(-1, keepdim=True)
    near = (centred.abs() < 1e-5).any(-1)
    x[near] = torch.arange(d, device=x.device).to(x.dtype).square()
    assert near.float().mean() < 0.05


@batches
@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_norm_act(kind: str, dtype: torch.dtype, B: int) -> None:
    hidden.compare(kind, "relu", hidden.make_inputs((B, h), kind, precision=(dtype, torch.float32)))


@batches
@dtypes
def test_dropout_is_the_same_in_the_backward_pass(dtype: torch.dtype, B: int) -> None:
    inputs = hidden.make_inputs((B, h), "layer", precision=(dtype, torch.float32))
    hidden.compare("layer", "relu", inputs, dropout=0.25, seed=7)


@batches
@dtypes
def test_power_norm_act(dtype: torch.dtype, B: int) -> None:
    power.compare("relu", *power.make_inputs((B, h), precision=(dtype, torch.float32)))


@pytest.mark.parametrize("N", [1, 500, 2048] if CUDA else [2])
@dtypes
def test_products_of_blocks(dtype: torch.dtype, N: int) -> None:
    projected = gemm.project_inputs((N, 3, 2 * F * d, F * d), dtype)
    ours = mask_project(*projected)
    gemm.assert_as_exact_as_eager(ours, lambda precision: gemm.projected(precision, *projected), terms=2 * F * d)
    inputs = gemm.block_inputs((N, 3, F * d, h), dtype)
    ours = block_gemm(*inputs, "rms", gemm.EPS, "relu")
    gemm.assert_as_exact_as_eager(ours, lambda precision: gemm.blocks(precision, "rms", "relu", inputs), terms=F * d)
