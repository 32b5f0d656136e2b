"""MaskNets in plain PyTorch, as rivals of training: as public code has it, and as strong as PyTorch alone makes it.

Written after FuxiCTR's MaskNet (reczoo/FuxiCTR, model_zoo/MaskNet, read and not copied). Both are parallel MaskNets
with the mask's second layer as wide as the embedding, a layer norm before each ReLU, and a sigmoid behind the loss.

Legend: B rows, F fields, d embedding width, D = F·d, h block width.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

INIT_STD, CLIP = 0.01, 10.0


class Shape(NamedTuple):
    """Of a parallel MaskNet."""

    fields: int
    rows: int  # of one field's table
    dim: int
    blocks: int
    width: int
    ratio: int
    head: tuple[int, ...]


class Block(nn.Module):
    """relu(LN(W (m ⊙ x)))."""

    def __init__(self, embedding_width: int, width: int, ratio: int) -> None:
        super().__init__()
        self.mask = nn.Sequential(
            nn.Linear(embedding_width, ratio * embedding_width),
            nn.ReLU(),
            nn.Linear(ratio * embedding_width, embedding_width),
        )
        self.hidden = nn.Sequential(nn.Linear(embedding_width, width, bias=False), nn.LayerNorm(width), nn.ReLU())

    def forward(self, raw_BD: torch.Tensor, x_BD: torch.Tensor) -> torch.Tensor:
        """Hidden vector [B, h]."""
        hidden_Bh: torch.Tensor = self.hidden(self.mask(raw_BD) * x_BD)
        return hidden_Bh


class Dense(nn.Module):
    """Blocks side by side, and an MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        embedding_width = shape.fields * shape.dim
        self.blocks = nn.ModuleList(Block(embedding_width, shape.width, shape.ratio) for _ in range(shape.blocks))
        widths = [shape.blocks * shape.width, *shape.head]
        layers = [(nn.Linear(i, o), nn.ReLU()) for i, o in pairwise(widths)]
        self.head = nn.Sequential(*(part for pair in layers for part in pair), nn.Linear(widths[-1], 1))

    def forward(self, raw_BD: torch.Tensor, x_BD: torch.Tensor) -> torch.Tensor:
        """Logits [B]."""
        logit_B: torch.Tensor = self.head(torch.cat([block(raw_BD, x_BD) for block in self.blocks], dim=1)).squeeze(1)
        return logit_B


class Plain(nn.Module):
    """(a) One embedding and one layer norm per field, in loops; Adam over all parameters, fp32."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        tables = [nn.Embedding(shape.rows, shape.dim) for _ in range(shape.fields)]
        for table in tables:
            nn.init.normal_(table.weight, std=INIT_STD)
        self.tables = nn.ModuleList(tables)
        self.norms = nn.ModuleList(nn.LayerNorm(shape.dim) for _ in range(shape.fields))
        self.dense = Dense(shape)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)

    def forward(self, ids: list[torch.Tensor]) -> torch.Tensor:
        """Logits [B]; `ids` are F columns [B]."""
        emb_BFd = torch.stack([table(column_B) for table, column_B in zip(self.tables, ids, strict=True)], dim=1)
        parts = emb_BFd.chunk(len(self.norms), dim=1)
        normed_BFd = torch.cat([norm(part) for norm, part in zip(self.norms, parts, strict=True)], dim=1)
        logit_B: torch.Tensor = self.dense(emb_BFd.flatten(1), normed_BFd.flatten(1))
        return logit_B

    def step(self, ids: list[torch.Tensor], label_B: torch.Tensor) -> float:
        """One step of training; the loss."""
        self.optimizer.zero_grad()
        loss = functional.binary_cross_entropy(self(ids).sigmoid(), label_B)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters(), CLIP)
        self.optimizer.step()
        return float(loss.detach())


class Strong(nn.Module):
    """(b), (c) One embedding for all fields with sparse gradients and Adagrad, all fields' norms at once, fused Adam.

    fp32 products go to oneDNN (`torch.set_float32_matmul_precision("medium")`), or all to bf16 by autocast.
    """

    def __init__(self, shape: Shape, *, bf16: bool, sparse_lr: float, onednn: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(shape.fields * shape.rows, shape.dim, sparse=True)
        nn.init.normal_(self.table.weight, std=INIT_STD)
        self.offset_F = torch.arange(shape.fields) * shape.rows
        self.scale = nn.Parameter(torch.ones(shape.fields, shape.dim))
        self.shift = nn.Parameter(torch.zeros(shape.fields, shape.dim))
        self.dense = Dense(shape)
        self.bf16, self.onednn = bf16, onednn
        rest = [self.scale, self.shift, *self.dense.parameters()]
        self.sparse = torch.optim.Adagrad([self.table.weight], lr=sparse_lr, eps=1e-8)
        self.adam = torch.optim.Adam(rest, lr=1e-3, fused=True)
        self.rest = rest

    def forward(self, ids_BF: torch.Tensor) -> torch.Tensor:
        """Logits [B] in fp32."""
        emb_BFd = self.table(ids_BF + self.offset_F)
        normed_BFd = functional.layer_norm(emb_BFd, emb_BFd.shape[-1:]) * self.scale + self.shift
        logit_B: torch.Tensor = self.dense(emb_BFd.flatten(1), normed_BFd.flatten(1))
        return logit_B.float()

    def step(self, ids_BF: torch.Tensor, label_B: torch.Tensor) -> float:
        """One step of training; the loss."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium" if self.onednn else "highest")
        try:
            self.adam.zero_grad()
            self.sparse.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                logit_B = self(ids_BF)
            loss = functional.binary_cross_entropy_with_logits(logit_B, label_B)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.rest, CLIP)
            self.adam.step()
            self.sparse.step()
        finally:
            torch.set_float32_matmul_precision(before)
        return float(loss.detach())


class _Rows(Dataset[npt.NDArray[np.float64]]):
    """Ids and label of a row in one array, as FuxiCTR's NpzDataset holds them."""

    def __init__(self, ids_NF: torch.Tensor, label_N: torch.Tensor) -> None:
        self.rows = np.column_stack([ids_NF.numpy(), label_N.numpy()]).astype(np.float64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> npt.NDArray[np.float64]:
        row: npt.NDArray[np.float64] = self.rows[index]
        return row


def plain_batches(
    ids_NF: torch.Tensor, label_N: torch.Tensor, batch: int
) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Endless batches as FuxiCTR makes them: row by row in one worker process."""
    # A worker that is forked from a process with OpenMP's threads crashes now and then.
    settings = {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True}
    loader = DataLoader(_Rows(ids_NF, label_N), batch_size=batch, shuffle=True, drop_last=True, **settings)
    while True:
        for rows in loader:
            yield list(rows[:, :-1].long().t().contiguous()), rows[:, -1].float()


def strong_batches(
    ids_NF: torch.Tensor, label_N: torch.Tensor, batch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches, each indexed at once: the fastest that the DataLoader's documentation has for tensors."""
    memory = TensorDataset(ids_NF, label_N)
    loader = DataLoader(memory, sampler=BatchSampler(RandomSampler(memory), batch, True), batch_size=None)
    while True:
        yield from loader
