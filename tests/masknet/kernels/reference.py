"""What the kernels are held against: the formulas in fp64, and eager torch, whose error is the measure of theirs.

Legend: B rows, F fields, d embedding width, h width of a hidden vector.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS, KAPPA = 1e-5, 3.0
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The share of a tensor's largest entry by which it may be wrong where eager is right by luck: a few roundings of fp32;
# one unit in the last place of 16 bits, for the interpreter cuts to bfloat16 where compiled code rounds.
FLOOR = {torch.float32: 2**-21, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# The largest entry counts as this at least. Where terms cancel, as in the gradient of a row of one entry, what is left
# is their roundings, and they are products of two or three normal numbers: up to 5, of which 2**-24 is 3e-7.
SMALL = 1.0

Rows = Callable[..., torch.Tensor]
ROWS: dict[str, Rows] = {
    "normal": torch.randn,
    "constant": lambda *shape: torch.randn(*shape[:-1], 1).expand(shape).clone(),
    "zero": torch.zeros,
    "tiny": lambda *shape: 1e-4 * torch.randn(shape),
    "offset": lambda *shape: 1e4 + torch.randn(shape),
    "constant offset": lambda *shape: 1e4 + torch.randn(*shape[:-1], 1).expand(shape),
}


def normalized(x: torch.Tensor, kind: str, extra: torch.Tensor | None) -> torch.Tensor:
    """x̂ over the last axis, by its formula."""
    centred = x - x.mean(-1, keepdim=True)
    rms = (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    deviation = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    if kind == "layer":
        return centred / deviation
    if kind == "variance_only":
        return x / deviation
    if kind == "l1":
        return centred / (centred.abs().mean(-1, keepdim=True) + EPS)
    if kind == "affine":
        return x if extra is None else x - extra
    if kind == "rms" or extra is None:
        return x / rms
    if kind == "seednorm":
        return x / rms * torch.tanh((x * extra[1]).sum(-1, keepdim=True))
    return torch.tanh(extra * x if kind == "dyt" else extra / KAPPA * x / rms)


def norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    extra: torch.Tensor | None,
    kind: str,
) -> torch.Tensor:
    """weight ⊙ x̂ + bias in fp64 or, as the eager norms do, in fp32 and then in the dtype of x."""
    wide = x if x.dtype == torch.float64 else x.float()
    if kind == "layer" and wide.dtype == torch.float32:
        y = functional.layer_norm(wide, x.shape[-1:], eps=EPS)
    elif kind == "rms" and wide.dtype == torch.float32:
        y = functional.rms_norm(wide, x.shape[-1:], eps=EPS)
    else:
        y = normalized(wide, kind, extra)
    if kind == "seednorm" and extra is not None:
        y = y * extra[0] + normalized(wide, "rms", None) * weight
    elif weight is not None:
        y = y * weight
    return (y if bias is None else y + bias).to(x.dtype)


Inputs = Sequence[torch.Tensor | None]


def run(function: Callable[..., torch.Tensor], inputs: Inputs, dout: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of the inputs that there are."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    grads = torch.autograd.grad(out, [x for x in leaves if x is not None], dout.to(out.dtype))
    return [out.detach(), *grads]


def double(inputs: Inputs) -> list[torch.Tensor | None]:
    """The inputs in fp64."""
    return [None if x is None else x.double() for x in inputs]


def assert_finite_alike(got: Sequence[torch.Tensor], eager: Sequence[torch.Tensor]) -> None:
    """The output is NaN and ±∞ where eager torch's is; gradients are finite where its are.

    Whether a gradient is NaN or ±∞ depends on the order in which infinities are added.
    """
    torch.testing.assert_close(got[0], eager[0], rtol=1e-4, atol=1e-5, equal_nan=True)
    for ours, theirs in zip(got[1:], eager[1:], strict=True):
        finite = theirs.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-4, atol=1e-5)


def assert_as_exact_as_eager(
    got: Sequence[torch.Tensor], eager: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]
) -> None:
    """The output and each gradient has the dtype and shape of eager torch's, and at most twice its error."""
    entries = exact[0].numel()
    for i, (ours, theirs, reference) in enumerate(zip(got, eager, exact, strict=True)):
        assert ours.dtype == theirs.dtype
        assert ours.shape == reference.shape
        # a parameter's gradient: the sum of n terms of about 1 is about √n, and as wrong where it happens to be near 0
        terms = entries / reference.numel()
        largest = max(reference.abs().max().item(), 0.5 * terms**0.5 if terms > 1 else SMALL)
        allowed = 2 * (theirs.double() - reference).abs().max().item() + FLOOR[ours.dtype] * largest
        error = (ours.double() - reference).abs().max().item()
        assert error <= allowed, f"tensor {i}: {error:.3g} above {allowed:.3g}, largest {largest:.3g}"
