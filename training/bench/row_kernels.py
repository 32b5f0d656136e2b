"""The kernels over rows against eager torch, torch.compile and other libraries' norms.

Legend: B rows, F fields, d embedding width, D = F·d, h width of a hidden vector.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product

import torch

from masknet.kernels import dispatch
from masknet.norms import make_norm
from masknet.norms.base import Norm
from training.bench.comparing import Case, Rivals
from training.bench.libraries import EPS, compiled, row_norms
from training.bench.timing import Call

F = 39
BATCHES = {False: (500, 8192, 65536), True: (8,)}  # by `quick`
DTYPES = {False: (torch.bfloat16, torch.float32), True: (torch.float32,)}
EMBEDDING_KINDS = {False: ("layer", "rms", "affine", "dyt"), True: ("layer",)}
HIDDEN_KINDS = {False: ("layer", "rms", "seednorm", "dyt", "affine"), True: ("layer",)}
Forward = Callable[[], torch.Tensor]
PASSES = {False: "forward", True: "forward and backward"}  # by whether there are gradients


def embedding_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """embedding_norm_mask: the norm of every field's embedding, times the mask."""
    widths = (10,) if quick else (10, 16)
    for kind, d, dtype, B, backward in product(EMBEDDING_KINDS[quick], widths, DTYPES[quick], BATCHES[quick], PASSES):
        facts = {"kind": kind, "pass": PASSES[backward], "B": B, "F": F, "d": d}
        rivals = partial(_embedding_rivals, device, kind, B, d, dtype, backward)
        # x, mask → out; then dout, x, mask → dx, dmask
        moved = (8 if backward else 3) * B * F * d * dtype.itemsize
        yield Case("embedding_norm_mask", facts, rivals, dtype, moved=moved)


def hidden_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """hidden_norm_act: the norm of a hidden vector and a ReLU."""
    widths = (400,) if quick else (400, 512)
    for kind, h, dtype, B, backward in product(HIDDEN_KINDS[quick], widths, DTYPES[quick], BATCHES[quick], PASSES):
        facts = {"kind": kind, "pass": PASSES[backward], "B": B, "h": h}
        rivals = partial(_hidden_rivals, device, kind, B, h, dtype, backward)
        # x → out; then dout, x → dx
        yield Case("hidden_norm_act", facts, rivals, dtype, moved=(5 if backward else 2) * B * h * dtype.itemsize)


def normal(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Standard normal entries, a leaf."""
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def norm_with_random_parameters(kind: str, shape: tuple[int, ...], device: torch.device) -> Norm:
    """A norm with the same affine and scalars for all fields, as libraries' norms of rows have."""
    norm = make_norm(kind, shape, eps=EPS)
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            scale = shape[-1] ** -0.5 if name == "beta" else 1.0  # of seednorm, so that its tanh is not ±1
            parameter.copy_((torch.rand(parameter.shape[-1]) + 0.5) * scale)
    return norm.to(device)


def one_pass(
    forward: Callable[[], torch.Tensor],
    inputs: Sequence[torch.Tensor],
    parameters: Iterable[torch.Tensor],
    dout: torch.Tensor | None,
) -> Call:
    """A call that returns the output and, where there is a `dout`, the gradients of the inputs.

    Those of the parameters are computed too, but not compared: rivals lay them out in different ways.
    """
    if dout is None:
        return torch.no_grad()(forward)
    leaves = [*inputs, *parameters]

    def call() -> list[torch.Tensor]:
        out = forward()
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)[: len(inputs)]]

    return call


def _embedding_rivals(device: torch.device, kind: str, B: int, d: int, dtype: torch.dtype, backward: bool) -> Rivals:
    from masknet.kernels.embedding_norm_mask import embedding_norm_mask

    norm = norm_with_random_parameters(kind, (F, d), device)
    x, mask = normal(device, dtype, B, F, d), normal(device, dtype, B, F * d)
    dout = torch.randn_like(mask) if backward else None

    def eager(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = mask * norm(x).flatten(1)
        return out

    def fused() -> torch.Tensor:
        f = norm.formula(x)
        out: torch.Tensor = embedding_norm_mask(x, mask, f.weight, f.bias, f.extra, f.kind, norm.eps, f.constant)
        return out

    by_torch = compiled(eager)
    timed = partial(one_pass, inputs=(x, mask), dout=dout)
    own: dict[str, Forward] = {"eager": lambda: eager(x, mask), "fused": fused, "compile": lambda: by_torch(x, mask)}
    rivals: Rivals = {name: timed(forward, parameters=list(norm.parameters())) for name, forward in own.items()}
    row = _parameters_of_a_row(norm)

    def by_library(row_norm: Callable[..., torch.Tensor]) -> torch.Tensor:
        return mask * row_norm(x.view(-1, d), *row).view(B, F * d)

    for name, found in row_norms(kind, backward).items():
        theirs = [each for each in row if each is not None]
        rivals[name] = found if isinstance(found, str) else timed(partial(by_library, found), parameters=theirs)
    return rivals


def _parameters_of_a_row(norm: Norm) -> tuple[torch.Tensor | None, ...]:
    """Weight, bias and α of one field, as leaves."""
    found = (getattr(norm, name, None) for name in ("weight", "bias", "alpha"))
    return tuple(None if each is None else each.detach()[0].clone().requires_grad_() for each in found)


def _hidden_rivals(device: torch.device, kind: str, B: int, h: int, dtype: torch.dtype, backward: bool) -> Rivals:
    norm = norm_with_random_parameters(kind, (h,), device)
    x = normal(device, dtype, B, h)
    dout = torch.randn_like(x) if backward else None

    def eager(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(norm(x))

    def by_library(row_norm: Callable[..., torch.Tensor]) -> torch.Tensor:
        return torch.relu(row_norm(x, *(getattr(norm, name, None) for name in ("weight", "bias", "alpha"))))

    by_torch = compiled(eager)
    timed = partial(one_pass, inputs=(x,), parameters=list(norm.parameters()), dout=dout)
    rivals: Rivals = {
        "eager": timed(lambda: eager(x)),
        "fused": timed(lambda: dispatch.hidden_norm_act(norm.formula(x), x, norm.eps, "relu")),
        "compile": timed(lambda: by_torch(x)),
    }
    for name, found in row_norms(kind, backward).items():
        rivals[name] = found if isinstance(found, str) else timed(partial(by_library, found))
    return rivals
