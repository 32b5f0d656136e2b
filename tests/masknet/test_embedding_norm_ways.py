"""Layer norm of embeddings in inference, whose way depends on how many rows there are: the values do not.

Legend: B rows, F fields, d embedding width.
"""

import pytest
import torch
from torch.nn import functional

from masknet.networks import PartialNorm
from masknet.norms.layer import LayerNorm

F, EPS = 19, 1e-5
SIZES = [1, 52, 53, 500, 6000]  # below and above 1,000 rows of fields, and above 2^20 entries


def rows(size: int, dim: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    made_BFd = torch.randn(size, F, dim, generator=torch.Generator().manual_seed(size + dim))
    made_BFd[0, 0] = 0.25  # constant
    return made_BFd * scale + shift


def formula(x_BFd: torch.Tensor) -> torch.Tensor:
    wide_BFd = x_BFd.double()
    centred_BFd = wide_BFd - wide_BFd.mean(-1, keepdim=True)
    return centred_BFd / (centred_BFd.square().mean(-1, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize("dim", [1, 2, 10, 16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-3, 0.0), (1.0, 100.0)])
def test_every_size_has_the_formulas_values(size: int, dim: int, scale: float, shift: float) -> None:
    norm, x_BFd = LayerNorm((F, dim), eps=EPS), rows(size, dim, scale, shift)
    with torch.inference_mode():
        found_BFd = norm.core(x_BFd)
    # How far fp32 can be off depends on the row (100 ± 1 has lost seven bits before anything is done with it): at most
    # twice as far as torch's own operation.
    expected_BFd = formula(x_BFd)
    own = (functional.layer_norm(x_BFd, (dim,), eps=EPS) - expected_BFd).abs().max()
    assert float((found_BFd - expected_BFd).abs().max()) <= 2 * float(own) + 1e-7


@pytest.mark.parametrize("dim", [2, 10, 16])
def test_one_way_gives_a_row_the_same_bits_in_every_batch(dim: int) -> None:
    norm, x_BFd = LayerNorm((F, dim), eps=EPS), rows(500, dim)
    norm.by_size = False
    with torch.inference_mode():
        whole_BFd = norm.core(x_BFd)
        for start, stop in ((0, 1), (7, 10), (100, 400)):
            assert torch.equal(norm.core(x_BFd[start:stop]), whole_BFd[start:stop])


@pytest.mark.parametrize("size", [3, 500])
@pytest.mark.parametrize("fields", [[0, 1, 2], [2, 3, 4, 5], [17, 18], [1, 3, 4], list(range(1, F))])
def test_norms_of_some_fields_leave_the_others(fields: list[int], size: int) -> None:
    norm, x_BFd = PartialNorm(LayerNorm((len(fields), 10), eps=EPS), fields, F), rows(size, 10)
    expected_BFd = x_BFd.double()
    expected_BFd[:, fields] = formula(x_BFd[:, fields])
    for context in (torch.inference_mode(), torch.enable_grad()):
        with context:
            torch.testing.assert_close(norm.core(x_BFd).double(), expected_BFd, rtol=1e-5, atol=2e-6)
            others = [field for field in range(F) if field not in fields]
            assert torch.equal(norm.core(x_BFd)[:, others], x_BFd[:, others])
