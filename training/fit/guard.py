"""A loss that is no number, or too large to be one of training: what was the batch, and where did it begin?"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipelineSemiSync, TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from features.batches import Batch
from features.errors import InputError, one_line
from features.files import write_json
from masknet.model import MaskNet
from training.config import Config
from training.distributed import World, sum_over_ranks
from training.errors import Failure
from training.fit.stopwatch import Stopwatch
from training.fit.task import StepOutput


class Guard:
    """Looks at every step's loss before its backward pass, while the weights are still what made it.

    Args:
        dmp: the sharded task.
        model: the model in it.
        config: `train.on_nan` and `train.max_loss`.
        world: this process.
        folder: where a batch that ends training is saved.
        stopwatch: times forward pass, backward pass and optimizer.
    """

    def __init__(
        self,
        dmp: DistributedModelParallel,
        model: MaskNet,
        config: Config,
        world: World,
        folder: Path,
        stopwatch: Stopwatch,
    ) -> None:
        self.step = 0  # the number of the step under way, counted from 1
        self.rejected = False
        self.stopwatch = stopwatch
        self._dmp, self._model, self._world, self._folder = dmp, model, world, folder
        self._skips, self._max_loss = config.train.on_nan == "skip", config.train.max_loss
        self._emb_BFD = torch.empty(0)
        model.network.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._emb_BFD = args[0].detach()

    def forward(self, batch: Batch) -> tuple[torch.Tensor, StepOutput]:
        """The task's forward pass; the ranks agree on what is to be skipped, and fail together.

        Raises:
            Failure: the loss is out of bounds and not to be skipped, or could not get better by skipping.
        """
        network = self._model.network
        before = [(buffer, buffer.clone()) for buffer in network.buffers()] if self._skips else []
        loss: torch.Tensor
        with self.stopwatch.of("forward"):
            loss, output = self._dmp(batch)
            # The rows' own loss is what has a bound; penalties on embeddings may be large, but they are numbers.
            total = loss.detach()
            value = float(torch.where(total.isfinite(), output.loss, total))
        is_bad, is_hopeless = self._agreed(not value <= self._max_loss)
        if is_hopeless:
            told = self._told(batch, value)
            raise Failure(f"{told}. Try a smaller learning rate, or train.on_nan=skip")
        if is_bad:
            for buffer, kept in before:  # running statistics have seen the batch already
                buffer.copy_(kept)
        self.rejected = is_bad
        return loss, output

    def _agreed(self, bad: bool) -> tuple[bool, bool]:
        """Whether any rank's loss is out of bounds, and whether that ends training; the same on every rank."""
        hopeless = bad and not (self._skips and self._weights_are_sound())
        if self._world.size == 1:
            return bad, hopeless
        found = torch.tensor([float(bad), float(hopeless)], device=self._world.device)
        is_bad, is_hopeless = (sum_over_ranks(found) > 0).tolist()
        return is_bad, is_hopeless

    def _weights_are_sound(self) -> bool:
        return all(bool(weight.isfinite().all()) for weight in self._model.network.parameters())

    def _told(self, batch: Batch, value: float) -> str:
        """What happened on the first rank where it did; every rank must call this, for norms exchange statistics."""
        place = first_broken(self._model, self._emb_BFD)
        mine = None if value <= self._max_loss else self._saved(batch, value, place)
        told: list[str | None] = [None] * self._world.size
        dist.all_gather_object(told, mine)
        return next(text for text in told if text is not None)

    def _saved(self, batch: Batch, value: float, place: str) -> str:
        folder = self._folder / f"step-{self.step}-rank-{self._world.rank}"
        saved = f"its batch is in {folder}"
        try:
            _save(batch, folder, {"step": self.step, "loss": repr(value), "place": place})
        except (OSError, SafetensorError) as error:
            saved = f"its batch could not be saved: {one_line(error)}"
        return f"the loss is {value:.6g} at step {self.step}: {place}; {saved}"


def first_broken(model: MaskNet, emb_BFD: torch.Tensor) -> str:
    """Where in a network's forward pass the first value appears that is no number, in words."""
    network = model.network
    for name, weight in [*network.named_parameters(), *network.named_buffers()]:
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            return f"the weights {name} are not finite since the update before"
    sound_F = emb_BFD.flatten(0, 0).isfinite().all(dim=-1).all(dim=0)
    if not bool(sound_F.all()):
        fields = [name for name, sound in zip(model.field_names, sound_F.tolist(), strict=True) if not sound]
        return f"the embeddings of {', '.join(fields)} are not finite"
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in network.named_modules() if name]
    try:
        with torch.no_grad():
            logit_B = network(emb_BFD)
    finally:
        for handle in hooks:
            handle.remove()
    if found:
        return f"it first appears in the output of {found[0]}"
    return f"all values are finite, and logits reach from {float(logit_B.min()):.3g} to {float(logit_B.max()):.3g}"


def _save(batch: Batch, folder: Path, report: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "ids": batch.ids.values(),
        "lengths": batch.ids.lengths(),
        "values": batch.values_BV,
        "missing": batch.missing_BV,
        "label": batch.label_B,
        "weight": batch.weight_B,
    }
    save_file({name: part.detach().cpu().contiguous() for name, part in parts.items()}, folder / "batch.safetensors")
    write_json(folder / "report.json", {**report, "fields_with_ids": batch.ids.keys()})


class _HeldOptimizer:
    """What a pipeline calls of an optimizer, which makes no step for a rejected batch."""

    def __init__(self, optimizer: CombinedOptimizer, guard: Guard) -> None:
        self._optimizer, self._guard = optimizer, guard

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self) -> None:
        if not self._guard.rejected:
            with self._guard.stopwatch.of("optimizer"):
                self._optimizer.step()


class GuardedPipeline(TrainPipelineSparseDist[Batch, StepOutput]):
    """TorchRec's pipeline, in which a rejected batch changes nothing."""

    def __init__(self, dmp: DistributedModelParallel, optimizer: CombinedOptimizer, world: World, guard: Guard) -> None:
        held: Any = _HeldOptimizer(optimizer, guard)
        super().__init__(dmp, held, world.device, custom_model_fwd=guard.forward)
        self._guard = guard

    def _backward(self, losses: torch.Tensor) -> None:
        if not self._guard.rejected:
            with self._guard.stopwatch.of("backward"):
                super()._backward(losses)


def require_pipeline(config: Config, device: str) -> None:
    """InputError unless a kind of device, "cpu" or "cuda", has the pipeline that `train.pipeline` names."""
    if config.train.pipeline == "semi_sync" and device != "cuda":
        raise InputError(f"train.pipeline semi_sync needs cuda; on {device} there is sparse_dist")


def build_pipeline(
    dmp: DistributedModelParallel, optimizer: CombinedOptimizer, config: Config, world: World, guard: Guard
) -> TrainPipelineSparseDist[Batch, StepOutput]:
    """The pipeline that `train.pipeline` names; InputError where the device has none of that kind."""
    require_pipeline(config, world.device.type)
    if config.train.pipeline == "semi_sync":  # from the first step on, so that it does not matter where one resumes
        return TrainPipelineSemiSync(dmp, optimizer, world.device, start_batch=0, custom_model_fwd=guard.forward)
    return GuardedPipeline(dmp, optimizer, world, guard)
