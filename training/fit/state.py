"""What a training is in the middle of: everything that a checkpoint has to hold so that nothing is lost."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from features.errors import InputError, one_line
from features.files import read_json
from training.distributed import World
from training.embeddings.managed import ManagedIds
from training.fit.average import WeightAverage
from training.fit.checkpoints import STATE, plain_tensors, read_tensors
from training.fit.identity import require_same
from training.optim.optimizers import prepare_for_load
from training.optim.schedule import Schedule

FORMAT = 1


@dataclass
class Position:
    """How far training has come; the same on every rank."""

    epoch: int = 0  # the pass under way, over the data or over a day of it, counted from 0
    epoch_step: int = 0  # its steps that are done
    step: int = 0  # steps done in all
    loss_sum: float = 0.0  # of the pass's steps
    loss_steps: int = 0  # how many those are, without skipped ones
    samples: int = 0
    seconds: float = 0.0  # spent in steps
    skipped: int = 0  # batches whose loss was out of bounds
    history: list[dict[str, float | None]] = field(default_factory=list)  # the metrics of every epoch or day
    best: str | None = None  # the checkpoint with the best epoch's weights
    best_epoch: int = -1
    best_value: float | None = None  # lower is better

    def mean_loss(self) -> float:
        """Of the pass's steps that were not skipped; NaN if all were."""
        return self.loss_sum / self.loss_steps if self.loss_steps else float("nan")

    def summary(self) -> dict[str, Any]:
        """Of a training over epochs that is done: its course, its speed, and validation at the best epoch."""
        best = self.history[self.best_epoch]
        return {
            "valid_logloss": best["logloss"],
            "valid_auc": best["auc"],
            "history": self.history,
            "best_epoch": self.best_epoch + 1,
            "steps": self.step,
            "samples_per_second": self.samples / self.seconds,
        }

    def improves(self, value: float) -> bool:
        """Whether an epoch's value, of which lower is better, is the best so far; NaN never is."""
        return value < float("inf") if self.best_value is None else value < self.best_value


@dataclass
class Training:
    """What changes while a training goes on, as one thing to save and restore."""

    dmp: DistributedModelParallel
    optimizer: CombinedOptimizer
    schedule: Schedule
    managed: ManagedIds
    average: WeightAverage | None
    position: Position
    world: World
    identity: dict[str, Any]  # what must be the same when training is resumed

    def tensors(self) -> dict[str, Any]:
        """The tensors of a checkpoint; every rank must call this."""
        replicated = {"managed": self.managed.state_dict(), "random": {"states": _random_states(self.world)}}
        return {**self._parts(), **{name: tensors for name, tensors in replicated.items() if tensors}}

    def state(self) -> dict[str, Any]:
        """Everything else."""
        position = self.position
        return {
            "format": FORMAT,
            "identity": self.identity,
            "world": self.world.size,
            "schedule": self.schedule.state_dict(),
            "position": asdict(position),
            "best": position.best,
        }

    def restore(self, path: Path) -> None:
        """Become what the checkpoint at `path` was, of any number of processes; every rank must call this.

        Raises:
            InputError: it is of another training, or its tables were placed in a way that this one's cannot take.
        """
        state = read_json(path / STATE, "checkpoint")
        if state["format"] != FORMAT:
            raise InputError(f"checkpoint {path} has format {state['format']}; this program reads {FORMAT}")
        require_same(self.identity, state["identity"], f"checkpoint {path}")
        prepare_for_load(self.optimizer)
        replicated = {name: plain_tensors(path, name) for name in ("managed", "random")}
        tensors = {**self._parts(), **{name: found for name, found in replicated.items() if found}}
        try:
            read_tensors(path, tensors)
        except CheckpointException as error:  # a table in or out of data_parallel, or row-wise statistics by columns
            cause, _ = next(iter(error.failures.values()))
            raise InputError(f"checkpoint {path} does not fit this sharding plan: {one_line(cause)}") from None
        self.dmp.load_state_dict(tensors["model"])
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.managed.load_state_dict(replicated["managed"])
        self.schedule.load_state_dict(state["schedule"])
        for name, value in state["position"].items():
            setattr(self.position, name, value)
        if state["world"] == self.world.size:
            # a copy, for torch crashes on a state that is a row of a larger tensor
            _set_random_state(self.world, replicated["random"]["states"][self.world.rank].clone())

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.dmp.state_dict(), "optimizer": self.optimizer.state_dict()}
        return parts if self.average is None else {**parts, "average": self.average.state_dict()}


def _random_state(world: World) -> torch.Tensor:
    """The state of the generator that dropout draws from: the device's."""
    return torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else torch.get_rng_state()


def _set_random_state(world: World, state: torch.Tensor) -> None:
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(state, world.device)
    else:
        torch.set_rng_state(state)


def _random_states(world: World) -> torch.Tensor:
    """Every rank's, [ranks, bytes]."""
    own = _random_state(world).to(world.device)
    states = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(states, own)
    return torch.stack(states).cpu()
