"""`train.precision`: in which arithmetic a network's products are computed, decided here for all devices.

fp32   products in fp32: on CUDA by cuBLAS without TF32, on a CPU by oneDNN in IEEE arithmetic
tf32   on CUDA in TF32, with 10 bits of mantissa for what is multiplied; a CPU has none and computes in fp32
bf16   products in bf16 with sums in fp32

Weights, their gradients, the optimizers' state, statistics of norms and the loss are fp32 in all of them. Serving is
not touched: it computes in fp32 whatever a model was trained in.
"""

from contextlib import AbstractContextManager
from typing import Literal

import torch

from masknet.kernels.products import trained_on_cpu

Precision = Literal["fp32", "tf32", "bf16"]


def set_precision(precision: Precision, device: torch.device) -> None:
    """Set what is set for a whole process: whether CUDA may take TF32 for fp32 products."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def computing(precision: Precision, device_type: str) -> AbstractContextManager[None]:
    """Where the forward pass of training and validation belongs."""
    if device_type == "cpu":
        return trained_on_cpu(torch.bfloat16 if precision == "bf16" else torch.float32)
    return torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16")
