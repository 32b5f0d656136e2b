"""Running statistics are those of evaluation: where nothing is dropped, and of the weights that are evaluated."""

from pathlib import Path

import pytest
import torch

from features.dataset import PreparedDataset
from training.ablation.diagnostics import sampled
from training.config import load_config
from training.distributed import join_world
from training.fit.dataset import Going, fit_dataset
from training.fit.recalibration import BATCHES
from training.fit.starting import build_model
from training.progress import Silent

CONFIG = Path(__file__).parents[2] / "training" / "configs" / "movielens.yaml"
SERIAL = ["model.kind=serial", "model.head=[]", "model.blocks=2", "model.block_width=64", "model.embedding_dim=8"]


@pytest.mark.parametrize("norm", ["power_v", "unified"])
def test_a_running_power_behind_dropout_is_that_of_evaluation(
    dataset: PreparedDataset, tmp_path: Path, norm: str
) -> None:
    train = ["train.epochs=3", "train.batch_size=256", "model.dropout=0.5"]
    config = load_config(CONFIG, [*SERIAL, *train, f"model.hidden_norm={norm}"])
    with join_world() as world:
        weights = fit_dataset(
            config, dataset, world, Going(checkpoints=tmp_path, failed=tmp_path, observer=Silent())
        ).weights
    assert weights is not None
    model = build_model(config.model, dataset)
    model.load_weights(weights.network, [weights.tables[name] for name in model.table_names])
    norms = [block.norm for block in model.network.blocks]
    seen: list[torch.Tensor] = []
    norms[1].register_forward_pre_hook(lambda _module, given: seen.append(given[0].detach().square().mean(0)))
    rows = dataset.split("train")
    model.network.eval()(sampled(model, dataset, rows).emb_BFd)
    ratio_h = norms[1].running_power / seen[0]
    # all 4,800 rows against the last few batches of 256: a tenth of noise at most; with dropout it is 1.7 to 1.9
    assert float(ratio_h.mean()) == pytest.approx(1.0, abs=0.12)
    assert int(norms[1].steps) == min(BATCHES, -(-rows.num_rows // 256))


PARALLEL = ["model.kind=parallel", "model.head=[8]"]


@pytest.mark.parametrize(
    "setting",
    [
        "train.average={name: ema, span: 3}",  # of weights that have come far in a few steps
        # which the norms of parallel blocks stand behind, too
        pytest.param("model.embedding_dropout=0.5", marks=pytest.mark.long),
    ],
)
def test_running_means_of_parallel_blocks_are_those_of_evaluation(
    dataset: PreparedDataset, tmp_path: Path, setting: str
) -> None:
    rates = ["optimizer.dense.lr=0.02", "train.epochs=3", "train.batch_size=512"]
    config = load_config(CONFIG, [*SERIAL, *PARALLEL, *rates, "model.hidden_norm=batch", setting])
    with join_world() as world:
        weights = fit_dataset(
            config, dataset, world, Going(checkpoints=tmp_path, failed=tmp_path, observer=Silent())
        ).weights
    assert weights is not None
    model = build_model(config.model, dataset)
    model.load_weights(weights.network, [weights.tables[name] for name in model.table_names])
    norm = model.network.blocks[0].norm
    seen: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _module, given: seen.append(given[0].detach()))
    model.network.eval()(sampled(model, dataset, dataset.split("train")).emb_BFd)
    # an epoch of ten batches, averaged evenly
    assert float((norm.running_var / seen[0].var(0)).mean()) == pytest.approx(1.0, abs=0.05)
    distance_h = (norm.running_mean - seen[0].mean(0)) / seen[0].std(0)
    assert float(distance_h.abs().max()) < 0.1
