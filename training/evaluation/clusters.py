"""What is drawn when rows are resampled: clusters of rows that depend on each other; and correction for many tests.

Legend: N rows, G clusters, R replicates; place 0 of an R axis is the rows as they are.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

Ints = npt.NDArray[np.integer]
MOST_CLUSTERS = 10_000


def clusters_of(group_N: npt.ArrayLike | None, rows: int, most: int = MOST_CLUSTERS, seed: int = 0) -> Ints:
    """Cluster of each row, 0 to G − 1 and none empty: a cluster per group, random ones once groups exceed `most`.

    A row without a group (None) is a group of its own, and so is every row where there are no groups. Random clusters
    of independent groups give their variance in expectation, with a relative error of √(2/G) however large the data.
    """
    if group_N is None:
        code_N, groups = np.arange(rows), rows
    else:
        code_N, known = pd.factorize(np.asarray(group_N))
        alone = code_N < 0
        groups = len(known) + int(alone.sum())
        code_N[alone] = np.arange(len(known), groups)
    if groups <= most:
        return code_N
    return (np.random.default_rng(seed).permutation(groups) % most)[code_N]


def drawn_weights(clusters: int, replicates: int, seed: int) -> npt.NDArray[np.float64]:
    """How often each cluster counts, weight_RG of [1 + R, G]: once in place 0, then as drawn with replacement.

    G − 1 of the G clusters are drawn: that many makes the variance unbiased (Rao and Wu, JASA 83, 1988).

    Raises:
        ValueError: there are fewer than two clusters.
    """
    if clusters < 2:
        raise ValueError("fewer than two clusters: the rows have no spread to resample")
    weight_RG = np.ones((1 + replicates, clusters))
    weight_RG[1:] = np.random.default_rng(seed).multinomial(clusters - 1, np.full(clusters, 1 / clusters), replicates)
    return weight_RG


def worth(rows_G: npt.NDArray[np.number]) -> npt.NDArray[np.floating]:
    """How many clusters of one size say as much as these [..., G] of so many rows: n² / Σ rows²; 0 without rows.

    Kish, Survey Sampling, 1965.
    """
    squares = np.square(rows_G, dtype=np.float64).sum(axis=-1)
    return np.asarray(rows_G.sum(axis=-1, dtype=np.float64) ** 2 / np.maximum(squares, 1.0))


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(p)
    steps = np.maximum.accumulate(np.array(p)[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(steps, 1.0)
    return [float(value) for value in corrected]
