"""Averages of weights: their values by sums in double precision, where they are used, and what they leave alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from features.dataset import LABEL, PreparedDataset
from features.errors import InputError
from features.metrics import logloss
from serving.scorer import Scorer
from tests.training.placed import TABLES, batches, configured, placed
from training.config import AverageConfig, Config, load_config
from training.distributed import join_world
from training.embeddings.placement import placements
from training.embeddings.sharding import gather_tables
from training.fit.average import WeightAverage
from training.fit.dataset import FitResult, Going, fit_dataset
from training.fit.starting import build_model
from training.optim.optimizers import build_optimizer
from training.progress import Silent

CONFIG = Path(__file__).parents[2] / "training" / "configs" / "movielens.yaml"
SMALL = ["model.block_width=16", "model.head=[8]", "model.embedding_dim=8", "model.blocks=2", "train.batch_size=512"]
State = dict[str, torch.Tensor]


def averaged(history: list[State], span: float, every: int) -> State:
    """The averages after so many steps, as one sum over what weights were taken in; `history[0]` is the start."""
    taken = range(every, len(history), every)
    share = {step: 1 - math.exp(-every / min(span, step / 4)) for step in taken}
    part = {step: share[step] * math.prod(1 - share[later] for later in taken if later > step) for step in taken}
    part[0] = 1 - sum(part.values())
    return {name: sum(part[step] * history[step][name].double() for step in part) for name in history[0]}  # type: ignore[misc]


def whole(dmp: DistributedModelParallel) -> State:
    """All weights, tables put together, as copies."""
    rest = {name: weight for name, weight in dmp.state_dict().items() if ".embedding_bags." not in name}
    tables = gather_tables(dmp, [table.name for table in TABLES])
    return {name: weight.detach().clone() for name, weight in {**rest, **tables}.items()}


def linear(averaging: AverageConfig, values: Callable[[int], float], steps: int) -> float:
    """The average of a single weight that is `values` of the step, in passes of 100 steps."""
    module = nn.Linear(1, 1, bias=False)
    average = WeightAverage(module, averaging)  # type: ignore[arg-type]
    for step in range(1, steps + 1):
        module.weight.data.fill_(values(step))
        average.update(step, 100)
    return float(average.state_dict()["weight"])


def test_an_average_lags_by_its_span() -> None:
    assert linear(AverageConfig(name="ema", span=1.0, every=1), float, 2000) == pytest.approx(2000 - 100, abs=1)
    assert linear(AverageConfig(name="ema", span=2.0, every=10), float, 4000) == pytest.approx(4000 - 200, abs=6)


@pytest.mark.parametrize("steps", [200, 1000])
def test_an_average_of_the_first_steps_is_one_of_the_last_part_of_them(steps: int) -> None:
    """Weights like s³ make the mean of s 4/5 of the last one, and leave nothing of the first."""
    config = AverageConfig(name="ema", span=1000.0, every=1)
    assert linear(config, float, steps) == pytest.approx(0.8 * steps, rel=0.01)
    assert linear(config, lambda step: 1.0 if step <= steps // 10 else 0.0, steps) == pytest.approx(1e-4, rel=0.2)


def test_short_spans_are_updated_more_often_than_asked() -> None:
    """Of a span of 40 steps every second at least: the weight of 3,999 is not yet in the average of 3,998."""
    config = AverageConfig(name="ema", span=0.4, every=10)
    assert linear(config, lambda step: float(step == 3998), 3999) == pytest.approx(1 - math.exp(-2 / 40), rel=1e-4)
    assert linear(config, lambda step: float(step == 3999), 3999) < 1e-30


@pytest.mark.parametrize(
    ("sharding", "tolerance"),
    [
        ({"type": "column_wise"}, 0.0),
        ({"tables": {"user": {"type": "data_parallel"}}}, 0.0),
        ({"dtype": "fp16"}, 1e-3),  # what is published of such tables is rounded as they are
    ],
)
def test_averages_are_those_of_all_weights(sharding: dict[str, Any], tolerance: float) -> None:
    config = configured(sharding=sharding, optimizer={"sparse": {"name": "sgd", "lr": 0.5}, "dense": {"lr": 0.01}})
    with join_world() as world:
        dmp, model = placed(config, world)
        optimizer = build_optimizer(dmp, config, model.network)
        average = WeightAverage(dmp, AverageConfig(name="ema", span=50.0, every=2))
        history = [whole(dmp)]
        for step, batch in enumerate(batches(21), 1):
            optimizer.zero_grad()
            dmp(batch)[0].backward()
            optimizer.step()
            average.update(step, 2)
            history.append(whole(dmp))
        with average.in_place():
            found = whole(dmp)
        after = whole(dmp)
    expected = averaged(history, 100.0, 2)
    assert found.keys() == expected.keys() > {"item", "user", "model.values.scale", "model.network.logit.bias"}
    for name, weight in expected.items():
        moved = float((weight - history[-1][name]).abs().max())
        assert moved > 1e-4 or name == "model.values.missing", name  # no value is missing
        slack = tolerance if name in ("item", "user") else 0.0
        torch.testing.assert_close(found[name].double(), weight, rtol=slack, atol=1e-6 + slack / 1e3, msg=name)
        assert torch.equal(after[name], history[-1][name])


def test_running_statistics_are_not_averaged() -> None:
    shape = {"embedding_dim": 16, "blocks": 2, "block_width": 16, "head": [8], "hidden_norm": "batch"}
    with join_world() as world:
        dmp, _ = placed(configured(model=shape), world)
        found = WeightAverage(dmp, AverageConfig(name="ema")).state_dict().keys()
        left = dmp.state_dict().keys() - found
    assert left == {
        f"model.network.blocks.{k}.norm.{name}" for k in (0, 1) for name in ("running_mean", "running_var", "steps")
    }


def test_weights_are_back_after_a_failure() -> None:
    module = nn.Linear(2, 2)
    average = WeightAverage(module, AverageConfig(name="ema"))  # type: ignore[arg-type]
    before = module.weight.detach().clone()
    module.weight.data += 1
    seen: list[torch.Tensor] = []

    def failing() -> None:
        with average.in_place():
            seen.append(module.weight.detach().clone())
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert torch.equal(seen[0], before)
    assert torch.equal(module.weight, before + 1)
    assert torch.equal(average.state_dict()["weight"], before)


# In training.


def small(*overrides: str) -> Config:
    return load_config(CONFIG, [*SMALL, "train.average={name: ema, span: 1.0, every: 1}", *overrides])


def fit(config: Config, dataset: PreparedDataset, folder: Path) -> FitResult:
    with join_world() as world:
        return fit_dataset(config, dataset, world, Going(checkpoints=folder, failed=folder, observer=Silent()))


def test_what_is_validated_and_kept_are_averages(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history: list[list[np.ndarray]] = []
    begin, update = WeightAverage.__init__, WeightAverage.update
    seen: list[DistributedModelParallel] = []

    def two_weights(dmp: DistributedModelParallel) -> list[np.ndarray]:
        state = dmp.state_dict()
        table = state["model.embeddings.embedding_bags.t000.weight"].local_shards()[0].tensor
        return [state["model.network.logit.weight"].detach().numpy().copy(), table.detach().numpy().copy()]

    def beginning(self: WeightAverage, dmp: DistributedModelParallel, config: AverageConfig) -> None:
        begin(self, dmp, config)
        seen.append(dmp)
        history.append(two_weights(dmp))

    def updating(self: WeightAverage, step: int, pass_steps: int) -> None:
        update(self, step, pass_steps)
        assert (step, pass_steps) == (len(history), 10)
        history.append(two_weights(seen[0]))

    monkeypatch.setattr(WeightAverage, "__init__", beginning)
    monkeypatch.setattr(WeightAverage, "update", updating)
    config = small("train.epochs=3")
    fitted = fit(config, dataset, tmp_path)
    assert fitted.weights is not None
    steps = (fitted.position.best_epoch + 1) * 10
    states = [{"logit": torch.from_numpy(a), "table": torch.from_numpy(b)} for a, b in history[: steps + 1]]
    expected = averaged(states, 10.0, 1)
    table = next(iter(fitted.weights.tables.values()))
    torch.testing.assert_close(fitted.weights.network["logit.weight"].double(), expected["logit"], rtol=0, atol=1e-6)
    torch.testing.assert_close(table.double(), expected["table"], rtol=0, atol=1e-6)
    assert float((states[-1]["logit"] - expected["logit"]).abs().max()) > 1e-4
    # the metrics are those of the same weights
    model = build_model(config.model, dataset)
    model.load_weights(fitted.weights.network, [fitted.weights.tables[name] for name in model.table_names])
    rows = dataset.split("valid")
    score_N = Scorer(dataset.pipeline, [model], 1.0, {}).score_encoded(rows)
    told = fitted.position.history[fitted.position.best_epoch]["logloss"]
    assert told == pytest.approx(logloss(rows[LABEL].to_numpy(), score_N), rel=1e-6)


@pytest.mark.long
def test_training_itself_knows_nothing_of_averages(dataset: PreparedDataset, tmp_path: Path) -> None:
    plain, with_averages = (
        fit(small("train.epochs=2", f"train.average.name={name}"), dataset, tmp_path / name).position.history
        for name in ("none", "ema")
    )
    assert [epoch["train_loss"] for epoch in plain] == [epoch["train_loss"] for epoch in with_averages]
    assert all(mine["logloss"] != other["logloss"] for mine, other in zip(plain, with_averages, strict=True))


# Where tables may be.


def test_tables_in_host_memory_have_no_averages() -> None:
    config = configured(sharding={"kernel": "fused_uvm"}, train={"average": {"name": "ema"}})
    with pytest.raises(
        InputError, match=r"sharding.kernel fused_uvm does not go with train.average.*there are dense, f"
    ):
        placements(config, TABLES, 1, "cuda")
    for name, kernels in [("none", ("fused", "fused_uvm", "fused_uvm_caching")), ("ema", ("fused",))]:
        asked = placements(configured(train={"average": {"name": name}}), TABLES, 1, "cuda")
        assert asked["t000"].kernels == kernels
