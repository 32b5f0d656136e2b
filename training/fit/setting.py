"""What a training is given beside its model and configuration."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from features.loader import BatchLoader
from training.distributed import World
from training.embeddings.managed import ManagedIds
from training.fit.checkpoints import Checkpoints
from training.fit.observer import Observer


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a training needs beside its model and configuration.

    Attributes:
        passes: this rank's batches of every pass over data, in turn, with the passes' names.
        managed: maps the ids of managed fields to rows.
        checkpoints: where they are written, and read when resuming.
        failed: folder for a batch that ends training.
        world: this process.
        observer: told of what happens.
        stop_asked: whether this process was asked to stop.
        resume: whether to go on from the newest checkpoint, if there is one.
        identity: what must be the same in a training and its resumption.
    """

    passes: list[tuple[str, BatchLoader]]
    managed: ManagedIds
    checkpoints: Checkpoints
    failed: Path
    world: World
    observer: Observer
    stop_asked: Callable[[], bool] = lambda: False
    resume: bool = False
    identity: dict[str, Any] = field(default_factory=dict)
