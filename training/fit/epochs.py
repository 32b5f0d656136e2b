"""Training over epochs: validation after each, early stop on the best."""

from math import isfinite

from features.loader import BatchLoader
from masknet.norms import settled_from
from training.config import EarlyStop
from training.errors import Failure
from training.fit.loop import Loop
from training.fit.state import Position
from training.fit.validation import validate


def fit_epochs(loop: Loop, valid: BatchLoader, early_stop: EarlyStop, valid_rate: float = 1.0) -> Position:
    """Train until the epochs are over or validation stops improving; every rank must call this.

    Where norms anneal or freeze, no epoch before they have settled is the best one, or the last. The best epoch's
    weights are in the checkpoint that the returned position names.

    Args:
        loop: a training whose passes are epochs.
        valid: this rank's batches of the validation split.
        early_stop: what decides on the best epoch and on the last.
        valid_rate: the kept share of those negatives that only the training split has lost, for which validation scores
            are corrected as the served ones are.

    Raises:
        Failure: the loss left its bounds, or no epoch had a validation metric that is a number.
        Stopped: a signal has asked for it; a checkpoint is written.
    """
    position, epochs = loop.position, len(loop.setting.passes)
    keep_from = settled_from(loop.network) * epochs
    while not (position.epoch >= epochs or _has_stalled(position, early_stop)):
        loop.train_pass()
        metrics = _validated(loop, valid, early_stop.metric, valid_rate, may_be_best=position.epoch >= keep_from)
        position.history.append({name: value if isfinite(value) else None for name, value in metrics.items()})
        if loop.setting.world.is_main:
            loop.setting.observer.epoch_done(position.epoch - 1, position.step, metrics)
        loop.save()
    loop.setting.checkpoints.wait()
    if position.best is None:
        raise Failure(f"no epoch had a validation {early_stop.metric} that is a number")
    return position


def _has_stalled(position: Position, early_stop: EarlyStop) -> bool:
    return position.best is not None and position.epoch - 1 - position.best_epoch >= early_stop.patience


def _validated(loop: Loop, valid: BatchLoader, metric: str, rate: float, *, may_be_best: bool) -> dict[str, float]:
    """An epoch's metrics; its weights are kept if they are the best so far."""
    setting, position = loop.setting, loop.position
    with loop.published():
        metrics = {
            "train_loss": position.mean_loss(),
            **validate(loop.dmp, valid, setting.managed, setting.world, rate),
        }
        value = -metrics["auc"] if metric == "auc" else metrics[metric]
        if may_be_best and position.improves(value):
            loop.keep_as_best(value)
    loop.schedule.epoch_done(value)
    return metrics
