"""Checkpoints on disk: written in the background, whole or absent, verified before they are read.

step-000000001000/   torch.distributed.checkpoint's files, a shard from every process
    state.json       everything that is no tensor
    digests.json     SHA-256 of every other file here
best-000003/         the same, with the weights of the best epoch alone

A process stages copies of its shards and goes on; a thread writes them into a folder aside, which is renamed when every
process has written and the digests are there. Where several machines train, all of them must see the folder.
"""

import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from features.errors import InputError, one_line
from features.files import hash_tree, read_json, write_json
from training.distributed import World
from training.errors import Failure

STATE, _DIGESTS, _ASIDE, _BEFORE = "state.json", "digests.json", ".partial", ".before"
_STEP = re.compile(r"step-\d{12}")
_NAME = 17  # characters of such a name


@dataclass(frozen=True)
class _Saved:
    """A checkpoint in memory."""

    name: str
    tensors: dict[str, Any]
    state: dict[str, Any]


class Checkpoints:
    """A training's checkpoints in one folder; every rank makes one, and calls the same methods in the same order.

    Args:
        folder: where they are; made when the first is written.
        keep: how many of the newest are kept, beside the best one.
        world: this process.
        warn: told, on rank 0, of a checkpoint that could not be written.
    """

    def __init__(self, folder: Path, keep: int, world: World, warn: Callable[[str], None]) -> None:
        self.folder = folder
        self._keep, self._world, self._warn = keep, world, warn
        self._group = dist.new_group(backend="gloo")  # the thread's own: its exchanges cross those of training
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masknet-checkpoint")
        self._writing: Future[None] | None = None
        self._unwritten: _Saved | None = None  # a best one that has failed

    def save(self, name: str, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Copy what is given, and write it in the background as soon as what was saved before is written.

        A failure is told of and ends nothing but the checkpoint. A best one that failed stays in memory and is tried
        again before the next, which would name it.

        Args:
            name: from `step_name` or `best_name`.
            tensors: nested; what torch.distributed.checkpoint takes, shards included.
            state: plain values, the same on every rank; `state["best"]` names the best checkpoint, which is kept.
        """
        self._join()  # one copy in memory at a time
        self._writing = self._thread.submit(self._write_all, _Saved(name, _staged(tensors), deepcopy(state)))

    def wait(self) -> None:
        """Until everything saved is written, or has failed to be.

        Raises:
            Failure: the best epoch's weights could not be written.
        """
        self._join()
        if self._unwritten is not None and not self._thread.submit(self._write, self._unwritten).result():
            raise Failure(f"the best epoch's weights could not be written to {self.folder}")

    def _join(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def newest(self) -> Path | None:
        """The newest checkpoint whose files are what they were; damaged ones are told of and passed over.

        Raises:
            InputError: there are checkpoints, and all are damaged.
        """
        found: list[Any] = [self._newest_sound() if self._world.is_main else None]
        dist.broadcast_object_list(found, src=0, group=self._group)
        if isinstance(found[0], str):
            raise InputError(found[0])
        path: Path | None = found[0]
        return path

    def _newest_sound(self) -> Path | str | None:
        """Or what is wrong with the oldest. Of a kill in the middle of a rename, what is aside is whole."""
        problem = None
        for path in sorted(self.folder.glob("step-*"), key=lambda path: (path.name[:_NAME], path.suffix), reverse=True):
            try:
                verify(path)
            except InputError as error:
                if not path.suffix:
                    problem = str(error)
                    self._warn(f"{error}; going back to the checkpoint before")
                continue
            return path
        return None if problem is None else f"{problem}, and there is no other: begin anew with another --out"

    def has(self, name: str) -> bool:
        """Whether a checkpoint is there; every rank must call this."""
        found = [(self.folder / name / _DIGESTS).exists()]
        dist.broadcast_object_list(found, src=0, group=self._group)
        return found[0]

    def close(self) -> None:
        """Wait for the thread and end it."""
        self._join()
        self._thread.shutdown()

    def _write_all(self, saved: _Saved) -> None:
        # A newer best one takes the place of one that has failed; a step's would name what is not there.
        if _STEP.fullmatch(saved.name) and self._unwritten is not None and not self._write(self._unwritten):
            return
        self._write(saved)

    def _write(self, saved: _Saved) -> bool:
        aside = self.folder / f"{saved.name}{_ASIDE}"
        problem = self._everywhere(lambda: self._prepare(aside))
        problem = problem or self._attempt(lambda: self._save(aside, saved.tensors))
        problem = problem or self._everywhere(lambda: self._finish(aside, saved))
        if not _STEP.fullmatch(saved.name):
            self._unwritten = None if problem is None else saved
        if problem is not None and self._world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            self._warn(f"{self.folder / saved.name} could not be written: {problem}; training goes on without it")
        return problem is None

    def _save(self, aside: Path, tensors: dict[str, Any]) -> None:
        writer = FileSystemWriter(aside, single_file_per_rank=True, overwrite=True)
        save(tensors, storage_writer=writer, process_group=self._group)

    def _prepare(self, aside: Path) -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def _finish(self, aside: Path, saved: _Saved) -> None:
        write_json(aside / STATE, saved.state)
        write_json(aside / _DIGESTS, hash_tree(aside))
        target = self.folder / saved.name
        before = target.with_suffix(_BEFORE)
        if target.exists():  # a resumed training may do a step again
            target.replace(before)
        aside.replace(target)
        shutil.rmtree(before, ignore_errors=True)
        if _STEP.fullmatch(saved.name):
            self._prune()

    def _prune(self) -> None:
        """Remove what is no longer needed; what cannot be read or removed stays."""
        found = [path for path in self.folder.iterdir() if path.is_dir()]
        newest = sorted((path for path in found if _STEP.fullmatch(path.name)), reverse=True)[: self._keep]
        kept = {path.name for path in newest}
        # An older checkpoint may name an older best one, without which it could not be gone back to.
        for path in newest:
            with suppress(InputError):
                kept.add(read_json(path / STATE, "checkpoint")["best"])
        for path in found:
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _everywhere(self, action: Callable[[], None]) -> str | None:
        """Do something on rank 0; every rank learns what went wrong, if anything did."""
        problem = [self._attempt(action) if self._world.is_main else None]
        dist.broadcast_object_list(problem, src=0, group=self._group)
        return problem[0]

    def _attempt(self, action: Callable[[], None]) -> str | None:
        try:
            action()
        except Exception as error:  # whatever it is, training is worth more than this checkpoint
            return one_line(error)
        except CheckpointException as error:  # a BaseException; the same on every rank
            rank, (cause, _) = next(iter(error.failures.items()))
            return f"{one_line(cause)} (rank {rank})"
        return None


def step_name(step: int) -> str:
    """Name of the checkpoint after `step` steps."""
    return f"step-{step:012d}"


def best_name(epoch: int) -> str:
    """Name of the checkpoint with the weights of an epoch, counted from 0."""
    return f"best-{epoch:06d}"


def verify(path: Path) -> None:
    """InputError unless the files of a checkpoint are those that were written."""
    digests = read_json(path / _DIGESTS, "checkpoint")
    found = hash_tree(path)
    found.pop(_DIGESTS)
    if found != digests:
        wrong = min(name for name in found.keys() | digests if found.get(name) != digests.get(name))
        raise InputError(f"checkpoint {path} is damaged: {wrong} is not what was written")


def read_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Fill nested tensors, shards included, from a checkpoint of any number of processes; every rank must call this."""
    # Flattening would drop the tables that this rank has no shard of, and torch then take the checkpoint for one of
    # torch 2.3, in which an optimizer without state was a key of its own.
    planner = DefaultLoadPlanner(flatten_sharded_tensors=False)
    load(tensors, storage_reader=FileSystemReader(path), planner=planner)


def read_whole(path: Path, tensors: dict[str, Any]) -> None:
    """Fill nested plain tensors from a checkpoint; for one rank, without the others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # which is what is wanted
        load(tensors, storage_reader=FileSystemReader(path), no_dist=True)


def plain_tensors(path: Path, name: str) -> dict[str, torch.Tensor]:
    """Unfilled tensors for what was saved under `name`, of the sizes that a checkpoint has."""
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        key.removeprefix(f"{name}."): torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in saved.items()
        if key.startswith(f"{name}.") and isinstance(item, TensorStorageMetadata)
    }


def _staged(value: Any) -> Any:
    """A copy on the CPU that later steps do not change."""
    if isinstance(value, dict):
        return {key: _staged(item) for key, item in value.items()}
    if isinstance(value, ShardedTensor):
        return value.clone() if value.device.type == "cpu" else value.cpu()
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    return deepcopy(value)
