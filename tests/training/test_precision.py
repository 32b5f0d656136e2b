"""`train.precision` and what a training process sets for itself."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.batches import Batch
from features.errors import InputError
from masknet.config import MaskNetConfig
from masknet.model import MaskNet, Table
from training.bench.train import flops
from training.config import load_config
from training.fit.precision import Precision, set_precision
from training.fit.task import ClickTask

ROOT = Path(__file__).parents[2]
ROWS, B = 50, 256
TABLES = tuple(Table(name=name, features=(name,), rows=ROWS, pooling="sum") for name in ("a", "b", "c"))


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(3)
    ids = KeyedJaggedTensor(
        [table.name for table in TABLES],
        torch.randint(ROWS, (len(TABLES) * B,)),
        lengths=torch.ones(len(TABLES) * B, dtype=torch.int32),
    )
    return Batch(ids, torch.empty(B, 0), torch.empty(B, 0), torch.randint(2, (B,)).float(), torch.rand(B) / B)


def loss_of(precision: Precision, batch: Batch) -> tuple[torch.Tensor, nn.Module]:
    torch.manual_seed(4)
    model = MaskNet(MaskNetConfig(block_width=32, head=(16,)), TABLES, tuple(table.name for table in TABLES))
    loss, _ = ClickTask(model, precision, "cpu")(batch)
    loss.backward()
    return loss.detach(), model


def reference(batch: Batch) -> torch.Tensor:
    """The loss without any of a training's arithmetic."""
    _, model = loss_of("fp32", batch)
    logit_B = model(batch.ids, batch.values_BV, batch.missing_BV)
    loss_B = functional.binary_cross_entropy_with_logits(logit_B, batch.label_B, reduction="none")
    return (loss_B * batch.weight_B).sum().detach()


def test_the_loss_in_every_precision(batch: Batch) -> None:
    """fp32 to a few roundings of 6e-8, bf16 to a few of 4e-3, of logits of about 0.3."""
    expected = reference(batch)
    torch.testing.assert_close(loss_of("fp32", batch)[0], expected, rtol=1e-6, atol=0)
    narrow = loss_of("bf16", batch)[0]
    torch.testing.assert_close(narrow, expected, rtol=4e-3, atol=0)
    assert narrow != expected


def test_tf32_is_fp32_on_a_cpu(batch: Batch) -> None:
    wide, wide_model = loss_of("fp32", batch)
    loss, model = loss_of("tf32", batch)
    assert torch.equal(loss, wide)
    for mine, theirs in zip(model.parameters(), wide_model.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)


def test_weights_and_gradients_stay_fp32(batch: Batch) -> None:
    for parameter in loss_of("bf16", batch)[1].parameters():
        assert parameter.grad is not None
        assert parameter.dtype == parameter.grad.dtype == torch.float32


def test_a_cpus_process_is_left_as_it_was() -> None:
    """Serving in the same process computes its products in IEEE arithmetic, whatever was trained."""
    for precision in ("fp32", "tf32", "bf16"):
        set_precision(precision, torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == "highest"


def test_there_is_no_other_precision() -> None:
    with pytest.raises(InputError, match=r"train\.precision"):
        load_config(ROOT / "training" / "configs" / "movielens.yaml", ["train.precision=fp16"])


def test_the_products_of_a_sample() -> None:
    """By hand: of 3 × 16 numbers, 3 blocks × 400 with r = 2, a head of 400 and 400, a logit; 2 a weight, 3 times."""
    with torch.device("meta"):
        network = MaskNet(MaskNetConfig(), TABLES, tuple("abc")).network
    blocks = 3 * (2 * 48 * 96 + 48 * 400)
    assert flops(network) == 6 * (blocks + 1200 * 400 + 400 * 400 + 400)


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
@pytest.mark.parametrize("keeps", [True, False])
def test_freed_memory_is_kept(keeps: bool) -> None:
    """Ten arrays of 8 MB, 20,480 pages in all, four times after a first: kept pages are not faulted in again."""
    script = f"""
import resource
import numpy as np
from features.allocator import keep_freed_memory
if {keeps}:
    keep_freed_memory()
for turn in range(5):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(2**20) for _ in range(10)]
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    faults = int(done.stdout)
    assert faults < 1000 if keeps else faults > 20_000
