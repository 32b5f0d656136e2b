"""What a training step computes beside the network: dropout of embeddings, and what embeddings start with."""

import math
from pathlib import Path

import pytest
import torch

from features.dataset import PreparedDataset
from masknet.model import initial_rows
from serving.bundle import tables_of
from tests.training.placed import FIELDS, batches, configured, unsharded
from training.config import load_config
from training.distributed import join_world
from training.fit.dataset import Going, fit_dataset
from training.fit.task import ClickTask
from training.progress import Silent

CONFIG = Path(__file__).parents[2] / "training" / "configs" / "movielens.yaml"


class Seen:
    """A task that remembers what its network has read, and whose embeddings are those of the unsharded model."""

    def __init__(self, dropout: float, l2: float = 0.0) -> None:
        self.model = unsharded(configured())
        self.task = ClickTask(self.model, "fp32", "cpu", embedding_l2=l2, embedding_dropout=dropout)
        self.read: list[torch.Tensor] = []
        self.model.network.register_forward_pre_hook(lambda _, given: self.read.append(given[0].detach()))
        self.batch = batches(1)[0]
        self.emb_BFd = self.model.embed(*self.batch.inputs).detach()


def test_whole_fields_are_dropped_and_the_others_scaled() -> None:
    seen = Seen(0.25)
    seen.task.train()
    torch.manual_seed(5)
    for _ in range(200):
        seen.task(seen.batch)
    read_RBFd = torch.stack(seen.read)
    dropped_RBF = (read_RBFd == 0).all(-1)
    raw_RBFd = seen.emb_BFd.expand_as(read_RBFd)
    empty_BF = (seen.emb_BFd == 0).all(-1)  # a history without items
    assert empty_BF.any()
    torch.testing.assert_close(read_RBFd[~dropped_RBF], raw_RBFd[~dropped_RBF] / 0.75, rtol=1e-6, atol=0)
    share_F = torch.stack([dropped_RBF[:, ~empty_BF[:, f], f].double().mean() for f in range(len(FIELDS))])
    draws = 200 * int((~empty_BF).sum(0).min())
    assert (share_F - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / draws)
    both = (dropped_RBF[..., 0] & dropped_RBF[..., 3]).double().mean()  # fields by themselves
    assert float(both) == pytest.approx(0.0625, abs=0.01)


@pytest.mark.parametrize(("dropout", "training"), [(0.25, False), (0.0, True)])
def test_nothing_is_dropped_or_drawn_where_it_is_not_asked(dropout: float, training: bool) -> None:
    seen = Seen(dropout)
    seen.task.train(training)
    before = torch.get_rng_state()
    seen.task(seen.batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(seen.read[0], seen.emb_BFd)


def test_the_penalty_is_of_embeddings_as_they_are() -> None:
    losses = []
    for l2 in (0.0, 0.5):
        seen = Seen(0.5, l2)
        seen.task.train()
        torch.manual_seed(1)
        losses.append(seen.task(seen.batch)[0].detach())
    expected = 0.25 * (seen.emb_BFd.square().sum((1, 2)) * seen.batch.weight_B).sum()
    torch.testing.assert_close(losses[1] - losses[0], expected, rtol=1e-4, atol=0)


def test_embeddings_start_with_the_deviation_that_is_asked(dataset: PreparedDataset, tmp_path: Path) -> None:
    """At rates of next to nothing they also end there."""
    rates = ["optimizer.dense.lr=1e-30", "optimizer.sparse.lr=1e-30", "train.epochs=1", "train.batch_size=5000"]
    shape = ["model.block_width=16", "model.head=[8]", "model.embedding_dim=8", "model.embedding_init=0.3"]
    with join_world() as world:
        going = Going(checkpoints=tmp_path, failed=tmp_path, observer=Silent())
        weights = fit_dataset(load_config(CONFIG, [*rates, *shape]), dataset, world, going).weights
    assert weights is not None
    for table in tables_of(dataset.pipeline):
        torch.testing.assert_close(weights.tables[table.name], 30 * initial_rows(table, 8, 1), rtol=1e-5, atol=1e-9)


def test_values_start_with_the_deviation_that_is_asked() -> None:
    found = {}
    for std in (0.01, 0.3):
        config = configured()
        config = config.model_copy(update={"model": config.model.model_copy(update={"embedding_init": std})})
        values = unsharded(config).values
        assert values is not None
        found[std] = torch.cat([weight.detach() for weight in values.parameters()])
    torch.testing.assert_close(found[0.3], 30 * found[0.01], rtol=1e-5, atol=0)
