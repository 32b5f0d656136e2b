"""The course of the learning rates, by itself and in the weights that training makes by it."""

import json
import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from tests.training.placed import batches, configured, placed, unsharded
from training.distributed import join_world
from training.optim.optimizers import build_optimizer
from training.optim.schedule import Schedule
from training.sections import ScheduleConfig

STEPS = 8


class Rates:
    """As much of an optimizer as a schedule needs: two parts, one of which is frozen."""

    optimizers: tuple[()] = ()

    def __init__(self) -> None:
        self.param_groups = [{"lr": 0.5}, {"lr": 0.0}]


def schedule(steps: int, **settings: object) -> Schedule:
    return Schedule(ScheduleConfig.model_validate(settings), Rates(), steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1.0] * 6),
        ({"warmup_steps": 1}, [1.0] * 6),
        ({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ({"warmup_steps": 9}, [1 / 9, 2 / 9, 3 / 9, 4 / 9, 5 / 9, 6 / 9]),
        ({"name": "linear"}, [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]),
        ({"name": "linear", "warmup_steps": 2, "final": 0.2}, [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ({"name": "cosine"}, [(1 + math.cos(math.pi * k / 5)) / 2 for k in range(6)]),
        ({"name": "cosine", "warmup_steps": 4, "final": 0.5}, [0.25, 0.5, 0.75, 1.0, 0.75, 0.5]),
    ],
)
def test_factor_by_step(settings: dict[str, object], expected: list[float]) -> None:
    course = schedule(6, **settings)
    assert [course.factor(step) for step in range(6)] == pytest.approx(expected, abs=1e-12)
    assert course.factor(60) == pytest.approx(1.0 if "name" not in settings else expected[-1], abs=1e-12)


def test_plateau_falls_after_so_many_epochs_without_improvement_that_came_after_the_warm_up() -> None:
    course = schedule(100, name="plateau", warmup_steps=3, factor=0.5, patience=2)
    seen = []
    # the first epoch ends within the warm-up; NaN is no improvement
    for step, value in [(1, 0.1), (3, 0.7), (4, 0.7), (5, 0.6), (6, 0.65), (7, math.nan), (8, 0.6), (9, 0.61)]:
        course.begin_step(step)
        course.epoch_done(value)
        seen.append(course.factor(step + 1))
    assert seen == [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25]


def test_state_is_plain_json_and_goes_on_where_it_was() -> None:
    settings = {"name": "plateau", "factor": 0.5, "patience": 2}
    first, second = schedule(100, **settings), schedule(100, **settings)
    assert json.loads(json.dumps(first.state_dict(), allow_nan=False)) == first.state_dict()  # before any epoch
    for value in (0.5, 0.6, 0.6, 0.6):
        first.begin_step(1)
        first.epoch_done(value)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for course in (first, second):
        course.begin_step(2)
        course.epoch_done(0.55)
    assert first.factor(3) == second.factor(3) == 0.25


def test_rates_are_their_own_times_the_factor_and_frozen_ones_stay_frozen() -> None:
    rates = Rates()
    course = Schedule(ScheduleConfig(warmup_steps=4), rates, 10)  # type: ignore[arg-type]
    seen = []
    for step in (0, 2, 3, 9):
        course.begin_step(step)
        seen.append([group["lr"] for group in rates.param_groups])
    assert seen == [[0.125, 0.0], [0.375, 0.0], [0.5, 0.0], [0.5, 0.0]]


@pytest.mark.parametrize("kind", ["table_wise", "data_parallel"])
def test_the_kth_update_is_by_the_kth_rate(kind: str) -> None:
    """Through TorchRec's own pipeline, against gradients of the unsharded model and W ← W − lr · factor · g by hand."""
    sgd = {"dense": {"name": "sgd", "lr": 0.2}, "sparse": {"name": "sgd", "lr": 0.5}}
    course = {"name": "cosine", "warmup_steps": 3}
    config = configured(
        optimizer=sgd, schedule=course, sharding={"type": kind}, train={"gradient_clip": None, "batch_size": 48}
    )
    with join_world() as world:
        dmp, model = placed(config, world)
        optimizer = build_optimizer(dmp, config, model.network)
        pipeline = TrainPipelineSparseDist(dmp, optimizer, world.device, execute_all_batches=True)
        plan, source = Schedule(config.schedule, optimizer, STEPS), iter(batches(STEPS))
        for step in range(STEPS):
            plan.begin_step(step)
            pipeline.progress(source)
        trained = {name: weight.clone() for name, weight in dmp.module.state_dict().items()}
        trained = {name.removeprefix("module.").removeprefix("model."): weight for name, weight in trained.items()}
    reference = unsharded(config)
    factors = [1 / 3, 2 / 3, *((1 + math.cos(math.pi * k / 5)) / 2 for k in range(6))]
    for batch, factor in zip(batches(STEPS), factors, strict=True):
        loss_B = binary_cross_entropy_with_logits(reference(*batch.inputs), batch.label_B, reduction="none")
        reference.zero_grad()
        (loss_B * batch.weight_B).sum().backward()
        with torch.no_grad():
            for name, weight in reference.named_parameters():
                assert weight.grad is not None
                weight -= (0.5 if name.startswith("embeddings") else 0.2) * factor * weight.grad
    for name, weight in reference.state_dict().items():
        found = trained[name]
        own = found.local_shards()[0].tensor if hasattr(found, "local_shards") else found
        # an update by the rate of the step before is off by 1e-3 and more
        torch.testing.assert_close(own, weight, rtol=0, atol=2e-6, msg=name)
