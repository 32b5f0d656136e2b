"""Matrix products and ReLUs of a network, and the one place that decides how training on a CPU does them.

Outside of `trained_on_cpu`, in serving above all, they are torch's own. Inside, embeddings are narrowed once where they
enter the network, layers compute in the precision of what they read, norms and the logit in fp32 (see
`masknet.norms.base`), and parameters and their gradients stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

from masknet.kernels import dispatch, onednn

_dtype: torch.dtype | None = None  # of products, inside of `trained_on_cpu`


@contextmanager
def trained_on_cpu(dtype: torch.dtype) -> Iterator[None]:
    """Run networks in `dtype`, fp32 or bf16, by oneDNN; by torch's autocast where MASKNET_KERNELS=eager says so.

    Gradients of what was computed inside have no gradients of their own.
    """
    global _dtype
    if dispatch.is_eager() or not onednn.has_products(dtype):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            yield
        return
    before, _dtype = _dtype, dtype
    try:
        yield
    finally:
        _dtype = before


def narrowed(x: torch.Tensor) -> torch.Tensor:
    """x in the precision of the products."""
    return x if _dtype is None else x.to(_dtype)


def unnarrowed(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What the layer makes of x in its weights' precision, also under autocast: bf16 leaves two digits of a logit."""
    wide = x.to(layer.weight.dtype)
    out: torch.Tensor
    if not torch.is_autocast_enabled(x.device.type):
        out = layer(wide)
    else:
        with torch.autocast(x.device.type, enabled=False):
            out = layer(wide)
    return out


def linear(x_Bi: torch.Tensor, weight_oi: torch.Tensor, bias_o: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + b [B, o]."""
    if _dtype is None:
        return functional.linear(x_Bi, weight_oi, bias_o)
    return onednn.product(x_Bi, weight_oi, bias_o)


def relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0); what the networks here hand to it is no longer needed, and may become the output."""
    if _dtype is None or x.dtype != torch.bfloat16:
        return functional.relu(x)
    return onednn.narrow_relu(x)


class Linear(nn.Linear):
    """torch's linear layer by `linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """W x + b."""
        return linear(input, self.weight, self.bias)


class ReLU(nn.ReLU):
    """torch's ReLU by `relu`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """max(x, 0)."""
        return relu(input)
