"""The members of an ensemble: trained one after the other, each as if it were alone, with a seed of its own."""

import gc
from dataclasses import replace

from features.dataset import PreparedDataset
from features.errors import InputError
from training.config import Config
from training.distributed import World
from training.fit.dataset import FitResult, Going, fit_dataset
from training.fit.days import is_whole
from training.fit.starting import Start


def require_members_possible(config: Config, dataset: PreparedDataset, start: Start | None) -> None:
    """InputError where several members are asked for and cannot be."""
    count = config.train.members
    if count == 1:
        return
    if start is not None:
        raise InputError(f"train.members {count}: training goes on from one model (--from); set it to 1")
    if not is_whole(dataset):
        raise InputError(f"train.members {count} needs a data set with a validation split; this one is a day")
    if dataset.pipeline.managed:
        field = next(iter(dataset.pipeline.managed))
        raise InputError(
            f"train.members {count}: field {field!r} is managed, and every member would give its ids other rows; set "
            "it to 1"
        )


def fit_members(
    config: Config, dataset: PreparedDataset, world: World, going: Going, start: Start | None = None
) -> list[FitResult]:
    """Train as many members as `train.members` says; every rank must call this.

    Checkpoints of several are in a folder each, so that a training that goes on finds the finished ones done.

    Raises:
        InputError, Failure, Stopped: as `fit_dataset`.
    """
    count = config.train.members
    if count == 1:
        return [fit_dataset(config, dataset, world, going, start)]
    fitted = []
    for number in range(count):
        if world.is_main:
            going.observer.member_started(number, count)
        own = replace(going, checkpoints=going.checkpoints / f"{number:02d}")
        fitted.append(fit_dataset(of_member(config, number), dataset, world, own, start))
        gc.collect()  # the model is in reference cycles, and its tables would stay beside the next member's
    return fitted


def of_member(config: Config, number: int) -> Config:
    """The configuration of a member alone, counted from 0."""
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": config.train.seed + number})})
