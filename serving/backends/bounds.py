"""Bounds between which a layer's input is rounded, chosen for the least error of its product.

Between the least and the largest value ever seen, steps are wide for the sake of a few values: products of masks reach
nine times their deviation. Bounds further in cut those and round all others more finely.

Legend: N rows, Z inputs and O outputs of a layer.
"""

from collections.abc import Iterator

import torch

from serving.backends.grid import Grid, steps_of

CUTS = (1e9, 5.0, 4.0, 3.0, 2.5)  # root mean squares of a column that its bound is at most; the first cuts nothing
WORTH = 1.2  # times the least error are the first bounds that are taken: what is cut is far off, on a few rows
FACTORS = tuple(0.85**power for power in range(10))  # of all bounds of a layer


def best_bounds(range_2Z: torch.Tensor, x_NZ: torch.Tensor, weight_OZ: torch.Tensor) -> torch.Tensor:
    """Those [2, Z], none wider than given, with which W x is nearly as near as may be to what it is in fp32.

    Args:
        range_2Z: the least and the largest value of each column, on all rows.
        x_NZ: some of the rows.
        weight_OZ: W.
    """
    tried = list(_tried(range_2Z, x_NZ))
    errors = [product_error(Grid.of(each, weight_OZ), x_NZ, weight_OZ) for each in tried]
    most = WORTH * min(errors)
    return next(each for each, error in zip(tried, errors, strict=True) if error <= most)


def _tried(range_2Z: torch.Tensor, x_NZ: torch.Tensor) -> Iterator[torch.Tensor]:
    rms_Z = x_NZ.square().mean(0).sqrt()
    for cut in CUTS:
        cut_2Z = torch.stack([torch.maximum(range_2Z[0], -cut * rms_Z), torch.minimum(range_2Z[1], cut * rms_Z)])
        yield from (cut_2Z * factor for factor in FACTORS)


def product_error(grid: Grid, x_NZ: torch.Tensor, weight_OZ: torch.Tensor) -> float:
    """Mean over rows of the squared error of W x, both rounded, if the errors of its terms are independent."""
    error_NZ = (grid(x_NZ).float() - grid.zero) * (grid.scale * grid.smooth_Z) - x_NZ
    of_inputs = (error_NZ.square().mean(0) * weight_OZ.square().sum(0)).sum()
    widths_O = steps_of(weight_OZ * grid.smooth_Z)
    of_weights = widths_O.square().sum() / 12 * (x_NZ / grid.smooth_Z).square().mean(0).sum()
    return float(of_inputs + of_weights)
