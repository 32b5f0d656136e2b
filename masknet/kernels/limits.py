"""What the kernels take, and how they like to read it. Nothing here needs Triton."""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # sums and statistics are fp32, too little for fp64
WIDEST_FIELD = 1024  # d of an embedding: up to here a row fits the backward pass's tile
WIDEST_HIDDEN = 8192  # h of a hidden vector: a row has to fit into the registers of a program
WIDEST_GEMM = 512  # h of a block: a row of its output is one tile, and more than this does not stay in registers
BLOCK_KINDS = ("none", "rms", "l1")  # of norms in the epilogue of a block's GEMM; others would spill registers
ALIGNMENT = 16  # entries; rows that start at multiples of it are read 16 bytes at a time in every type


def padded(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Room for a tensor whose rows, along the last axis, start at multiples of ALIGNMENT entries."""
    *others, width = shape
    return like.new_empty(*others, -(-width // ALIGNMENT) * ALIGNMENT)[..., :width]


def align_rows(weight: torch.Tensor) -> torch.Tensor:
    """The same values with rows that start so; the weight itself where they do."""
    *others, last = weight.stride()
    if last == 1 and all(stride % ALIGNMENT == 0 for stride in others):
        return weight
    return padded(weight, *weight.shape).copy_(weight)
