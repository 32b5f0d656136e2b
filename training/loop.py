"""The training loop: epochs, validation after each, early stop on the best."""

import math
import time
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from features.loader import BatchLoader
from features.metrics import auc, logloss
from masknet.norms import set_progress, settled_from
from training.config import Config
from training.distributed import World, concat_over_ranks, sum_over_ranks
from training.errors import Failure
from training.recalibration import recalibrated
from training.sharding import build_optimizer, gather_tables, unwrapped
from training.task import ClickTask, StepOutput

REPORT_STEPS = 10
AUC_WINDOW = 65_536  # rows of the running training AUC that the progress bar shows


class Observer(Protocol):
    """Who wants to know how training goes; called on rank 0 only."""

    def epoch_started(self, epoch: int, steps: int) -> None:
        """An epoch of `steps` steps begins."""

    def steps_done(self, step: int, losses: list[float], auc: float | None, samples_per_second: float) -> None:
        """`step` steps are done in all; `losses` are those of the newest ones."""

    def epoch_done(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """An epoch and its validation are done."""


@dataclass
class Weights:
    """A trained model's weights, whole: all but the tables, and the tables by name, those on rank 0 only."""

    network: dict[str, torch.Tensor]
    tables: dict[str, torch.Tensor]


@dataclass
class FitResult:
    """What training ended with. `history` has one entry per epoch."""

    weights: Weights = field(default_factory=lambda: Weights({}, {}))
    best_epoch: int = 0
    steps: int = 0
    samples: int = 0
    train_seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


class _Best:
    """The best epoch so far, and whether to go on."""

    def __init__(self, metric: str, patience: int) -> None:
        self._metric, self._sign = metric, -1.0 if metric == "auc" else 1.0
        self._patience = patience
        self._value, self._epoch = float("inf"), -1

    def improves(self, epoch: int, metrics: dict[str, float]) -> bool:
        value = self._sign * metrics[self._metric]
        if not value < self._value:
            return False
        self._value, self._epoch = value, epoch
        return True

    def is_over(self, epoch: int) -> bool:
        return epoch - self._epoch >= self._patience


def fit(
    dmp: DistributedModelParallel,
    config: Config,
    loaders: dict[str, BatchLoader],
    world: World,
    observer: Observer,
    valid_rate: float = 1.0,
) -> FitResult:
    """Train until the epochs are over or validation stops improving; every rank must call this.

    Where norms anneal or freeze, no epoch before they have settled is the best one, or the last.

    Args:
        dmp: a sharded `ClickTask`.
        config: the whole configuration.
        loaders: this rank's "train" and "valid" batches.
        world: this process.
        observer: told of every `REPORT_STEPS` steps and of every epoch.
        valid_rate: the kept share of those negatives that only the training split has lost, for which validation scores
            are corrected as the served ones are.

    Raises:
        Failure: the loss became NaN or infinite; names the step.
    """
    network = _task(dmp).model.network
    optimizer = build_optimizer(dmp, config.optimizer.dense, network)
    pipeline = TrainPipelineSparseDist(dmp, optimizer, world.device, execute_all_batches=True)
    best = _Best(config.train.early_stop.metric, config.train.early_stop.patience)
    result, keep_from = FitResult(), settled_from(network)
    for epoch in range(config.train.epochs):
        if world.is_main:
            observer.epoch_started(epoch, len(loaders["train"]))
        started = time.perf_counter()
        dmp.train()
        report = _Reporter(result.steps, world, observer)
        batches, steps = loaders["train"].epoch(epoch), len(loaders["train"])
        for step in range(steps):
            set_progress(network, (epoch + step / steps) / config.train.epochs)
            report.add(pipeline.progress(batches))
        report.flush()
        result.train_seconds += time.perf_counter() - started
        set_progress(network, (epoch + 1) / config.train.epochs)
        result.steps += steps
        result.samples += loaders["train"].num_rows
        pipeline.detach()  # validation calls the model itself, without the pipeline's prefetched inputs
        may_end = (epoch + 1) / config.train.epochs >= keep_from
        with recalibrated(dmp, network, loaders["train"], world):
            metrics = {"train_loss": report.mean_loss, **_validate(dmp, loaders["valid"], world, valid_rate)}
            if may_end and best.improves(epoch, metrics):
                result.weights, result.best_epoch = _collect(dmp), epoch
        result.history.append(metrics)
        if world.is_main:
            observer.epoch_done(epoch, result.steps, metrics)
        if may_end and best.is_over(epoch):
            break
        pipeline.attach()
    if not result.weights.network:
        raise Failure(f"no epoch had a validation {config.train.early_stop.metric} that is a number")
    return result


def _task(dmp: DistributedModelParallel) -> ClickTask:
    task = unwrapped(dmp)
    assert isinstance(task, ClickTask)  # what `fit` was given
    return task


def _collect(dmp: DistributedModelParallel) -> Weights:
    model = _task(dmp).model
    return Weights(model.dense_state(), gather_tables(dmp, model.table_names))


class _Reporter:
    """Gathers steps and reports them together, so that ranks exchange losses every few steps only."""

    def __init__(self, first_step: int, world: World, observer: Observer) -> None:
        self._step, self._world, self._observer = first_step, world, observer
        self._pending: list[StepOutput] = []
        self._logit_N, self._label_N = np.empty(0, np.float32), np.empty(0, np.float32)
        self._since = time.perf_counter()
        self._losses: list[float] = []

    def add(self, output: StepOutput) -> None:
        self._pending.append(output)
        if len(self._pending) == REPORT_STEPS:
            self.flush()

    def flush(self) -> None:
        if not self._pending:
            return
        losses = sum_over_ranks(torch.stack([output.loss for output in self._pending])) / self._world.size
        for value in losses.tolist():
            self._step += 1
            if not np.isfinite(value):
                raise Failure(f"the loss is {value} at step {self._step}; try a smaller learning rate")
            self._losses.append(value)
        if self._world.is_main:
            now = time.perf_counter()
            rows = sum(len(output.label_B) for output in self._pending) * self._world.size
            self._observer.steps_done(self._step, losses.tolist(), self._running_auc(), rows / (now - self._since))
            self._since = now
        self._pending.clear()

    def _running_auc(self) -> float | None:
        logits = [self._logit_N, *(output.logit_B.cpu().numpy() for output in self._pending)]
        labels = [self._label_N, *(output.label_B.cpu().numpy() for output in self._pending)]
        self._logit_N = np.concatenate(logits)[-AUC_WINDOW:]
        self._label_N = np.concatenate(labels)[-AUC_WINDOW:]
        return auc(self._label_N, self._logit_N)

    @property
    def mean_loss(self) -> float:
        return float(np.mean(self._losses))


def _validate(dmp: DistributedModelParallel, loader: BatchLoader, world: World, rate: float) -> dict[str, float]:
    """Log loss and AUC of the whole validation split, with scores σ(logit − log(1 / rate)); the same on every rank."""
    dmp.eval()
    outputs: list[StepOutput] = []
    with torch.no_grad():
        for batch in loader.epoch(0):
            outputs.append(dmp(batch.to(world.device))[1])
    logit_N = concat_over_ranks(torch.cat([output.logit_B for output in outputs])) + math.log(rate)
    score_N = logit_N.sigmoid().cpu().numpy()
    label_N = concat_over_ranks(torch.cat([output.label_B for output in outputs])).cpu().numpy()
    value = auc(label_N, score_N)
    return {"logloss": logloss(label_N, score_N), "auc": float("nan") if value is None else value}
