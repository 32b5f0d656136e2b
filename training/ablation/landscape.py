"""The loss around a trained network's dense weights: curvature at them, and a plane of the loss through them.

Raw sharpness does not compare networks: where a layer is scale-invariant, as one before a norm is, a rescaling of its
weights leaves the function as it was and changes the Hessian at will (Dinh et al., arXiv 1703.04933; Böther et al.,
arXiv 2412.10146). Hence curvature comes in two coordinates, raw and relative to the norms of the filters, and the plane
in the latter alone.

Everything is measured in evaluation mode over fixed rows that are all in memory at once; the network stays as it is.
Legend: B rows, F fields, d embedding width, P parameters, K grid points of an axis or steps, Q probes.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

FloatK = npt.NDArray[np.float64]
FloatKK = npt.NDArray[np.float64]
Product = Callable[[torch.Tensor], torch.Tensor]
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # embeddings, labels, weights
Estimate = tuple[float, float]  # a value and its error


@dataclass(frozen=True)
class Curvature:
    """The Hessian H of the mean loss in nats, and D·H·D, D the norm of the filter that each parameter belongs to.

    `largest` is a lower bound of H's largest eigenvalue, and some eigenvalue lies within `largest_error` of it, but for
    rounding; `trace_error` is a standard error. All are NaN where the loss has no finite curvature.
    """

    largest: float
    largest_error: float
    trace: float
    trace_error: float
    largest_normalized: float
    largest_normalized_error: float
    trace_normalized: float
    trace_normalized_error: float
    rows: int
    parameters: int


@dataclass(frozen=True)
class Surface:
    """Mean loss in nats at weights + axis_K[j] · first + axis_K[i] · second direction, in loss_KK[i, j].

    A step of 1 is as long as the weights are, filter by filter. NaN stands where the loss is not finite.
    """

    axis_K: FloatK
    loss_KK: FloatKK


def curvature(
    network: nn.Module,
    emb_BFd: torch.Tensor,
    label_B: torch.Tensor,
    weight_B: torch.Tensor,
    *,
    probes: int = 32,
    lanczos_steps: int = 40,
    seed: int = 0,
) -> Curvature:
    """Largest eigenvalue (Lanczos) and trace (Hutchinson) of the Hessian over all parameters that require gradients.

    Products with the Hessian are exact, by double backward, as in PyHessian (arXiv 1912.07145). A filter is a row of a
    matrix or a whole vector (arXiv 1712.09913); one of zeros has no relative coordinate, so it adds nothing to D·H·D.

    Args:
        network: maps embeddings [B, F, d] to logits [B].
        emb_BFd: embeddings.
        label_B: 0 or 1.
        weight_B: weight of each row in the mean.
        probes: random vectors of each trace, 2 or more; errors fall with its root.
        lanczos_steps: products with each matrix; the basis takes steps · P numbers of memory.
        seed: of the random vectors, which are the same on every device.
    """
    with _evaluating(network), torch.enable_grad():
        weights = {name: weight.detach() for name, weight in network.named_parameters() if weight.requires_grad}
        weight_P = torch.cat([weight.flatten() for weight in weights.values()]).requires_grad_()
        pieces = torch.split(weight_P, [weight.numel() for weight in weights.values()])
        views = {name: piece.view_as(weights[name]) for name, piece in zip(weights, pieces, strict=True)}
        loss = _loss(network, views, (emb_BFd, label_B, weight_B))
        (gradient_P,) = torch.autograd.grad(loss, weight_P, create_graph=True)
        norm_P = torch.cat([_filter_norm(weight).expand_as(weight).flatten() for weight in weights.values()])

        def product(vector_P: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(gradient_P, weight_P, vector_P, retain_graph=True)[0]

        def relative(vector_P: torch.Tensor) -> torch.Tensor:
            return norm_P * product(norm_P * vector_P)

        return Curvature(
            *_lanczos(product, weight_P.detach(), lanczos_steps, seed),
            *_hutchinson(product, weight_P.detach(), probes, seed),
            *_lanczos(relative, weight_P.detach(), lanczos_steps, seed),
            *_hutchinson(relative, weight_P.detach(), probes, seed),
            rows=len(label_B),
            parameters=len(weight_P),
        )


def surface(
    network: nn.Module,
    emb_BFd: torch.Tensor,
    label_B: torch.Tensor,
    weight_B: torch.Tensor,
    *,
    points: int = 21,
    reach: float = 1.0,
    seed: int = 0,
) -> Surface:
    """The loss on a plane of two random filter-normalized directions through the weights (Li et al., arXiv 1712.09913).

    Matrices of linear layers move; biases and the parameters of other modules, norms' affines among them, stay.

    Args:
        network: maps embeddings [B, F, d] to logits [B].
        emb_BFd: embeddings.
        label_B: 0 or 1.
        weight_B: weight of each row in the mean.
        points: K, odd, so that the weights themselves are the point in the middle.
        reach: the axis runs from -reach to reach.
        seed: of the directions, which are alike for networks whose matrices have equal names and shapes.

    Raises:
        ValueError: `points` is even or below 3.
    """
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points must be odd and 3 or more, to have the weights in the middle; they are {points}")
    axis_K = reach * np.arange(1 - points, points, 2) / (points - 1)
    loss_KK = np.empty((points, points))
    first, second = (_direction(network, seed, number) for number in (0, 1))
    base = {name: weight for name, weight in network.named_parameters() if name in first}
    with _evaluating(network), torch.no_grad():
        for i, j in np.ndindex(points, points):
            x, y = float(axis_K[j]), float(axis_K[i])
            moved = {name: weight + x * first[name] + y * second[name] for name, weight in base.items()}
            loss = float(_loss(network, moved, (emb_BFd, label_B, weight_B)))
            loss_KK[i, j] = loss if math.isfinite(loss) else math.nan
    return Surface(axis_K, loss_KK)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _loss(network: nn.Module, weights: dict[str, torch.Tensor], rows: Rows) -> torch.Tensor:
    """Weighted mean binary cross-entropy [] with `weights` in place of the network's own of those names."""
    emb_BFd, label_B, weight_B = rows
    logit_B = functional_call(network, weights, (emb_BFd,))
    loss_B = functional.binary_cross_entropy_with_logits(logit_B, label_B, reduction="none")
    return (loss_B * weight_B).sum() / weight_B.sum()


def _filter_norm(weight: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(weight, dim=-1, keepdim=True)


def _direction(network: nn.Module, seed: int, number: int) -> dict[str, torch.Tensor]:
    direction = {}
    for name, weight in network.named_parameters():
        if weight.ndim == 2 and isinstance(network.get_submodule(name.rpartition(".")[0]), nn.Linear):
            # a seed for each name: a norm that brings matrices of its own leaves the others' directions as they are
            random = np.random.default_rng([seed, number, zlib.crc32(name.encode())])
            gaussian = torch.from_numpy(random.standard_normal(weight.shape)).to(weight)
            direction[name] = gaussian * (_filter_norm(weight.detach()) / _filter_norm(gaussian))
    return direction


def _lanczos(product: Product, like_P: torch.Tensor, steps: int, seed: int) -> Estimate:
    """The largest Ritz value after `steps` steps (Lanczos 1950), and the norm of its residual."""
    start_P = torch.randn(len(like_P), generator=torch.Generator().manual_seed(seed)).to(like_P)
    vector_P = start_P / start_P.norm()
    basis_KP = like_P.new_zeros(min(steps, len(like_P)), len(like_P))
    diagonal, beside = [], []
    for step in range(len(basis_KP)):
        basis_KP[step] = vector_P
        image_P = product(vector_P)
        diagonal.append(float(vector_P @ image_P))
        known_KP = basis_KP[: step + 1]
        for _ in range(2):  # rounding leaves some of the known directions after the first time
            image_P = image_P - known_KP.T @ (known_KP @ image_P)
        beside.append(float(image_P.norm()))
        if not math.isfinite(beside[-1]):
            return math.nan, math.nan
        if beside[-1] <= torch.finfo(like_P.dtype).eps * max(map(abs, diagonal)):
            break  # the known directions are an invariant subspace; what is left is rounding
        vector_P = image_P / beside[-1]
    value_K, ritz_KK = np.linalg.eigh(np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1))
    return float(value_K[-1]), float(abs(beside[-1] * ritz_KK[-1, -1]))


def _hutchinson(product: Product, like_P: torch.Tensor, probes: int, seed: int) -> Estimate:
    """Mean of zᵀHz over random signs z (Hutchinson 1990), and its standard error."""
    random = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(probes):
        sign_P = torch.randint(0, 2, (len(like_P),), generator=random).to(like_P) * 2 - 1
        values.append(float(sign_P @ product(sign_P)))
    value_Q = torch.tensor(values, dtype=torch.float64)
    return float(value_Q.mean()), float(value_Q.std()) / math.sqrt(probes)
