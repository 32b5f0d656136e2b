"""The training loop: passes over data, in segments at whose ends nothing is in flight, with checkpoints on the way."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice

from torchrec.distributed.model_parallel import DistributedModelParallel

from features.batches import Batch
from masknet.networks import Network
from masknet.norms import set_progress
from training.config import Config
from training.embeddings.sharding import unwrapped
from training.errors import Failure, Stopped
from training.fit.average import WeightAverage
from training.fit.checkpoints import best_name, step_name
from training.fit.guard import Guard, build_pipeline
from training.fit.recalibration import recalibrated
from training.fit.reporting import Reporter
from training.fit.setting import Setting
from training.fit.state import Position, Training
from training.fit.stopwatch import Stopwatch
from training.fit.task import ClickTask
from training.optim.optimizers import build_optimizer
from training.optim.schedule import Schedule

MANAGED_UPDATES = 10  # times at least that new ids get rows


class Loop:
    """A training under way, at its beginning or where the newest checkpoint was; every rank makes one alike.

    Args:
        dmp: a sharded `ClickTask`.
        config: the whole configuration.
        setting: data, checkpoints, who is told.
    """

    def __init__(self, dmp: DistributedModelParallel, config: Config, setting: Setting) -> None:
        task = unwrapped(dmp)
        assert isinstance(task, ClickTask)  # what the caller was to give
        self.dmp, self.setting, self.position = dmp, setting, Position()
        self.model = task.model
        self.network: Network = task.model.network
        self._train = config.train
        self._optimizer = build_optimizer(dmp, config, self.network)
        self._steps = sum(len(loader) for _, loader in setting.passes)
        # A training of a few steps, on a day, say, has to learn ids too.
        self._managed_steps = min(config.train.managed_steps, max(1, self._steps // MANAGED_UPDATES))
        self.schedule = Schedule(config.schedule, self._optimizer, self._steps)
        average = config.train.average
        self._average = WeightAverage(dmp, average) if average.name != "none" else None
        self._training = Training(
            dmp=dmp,
            optimizer=self._optimizer,
            schedule=self.schedule,
            managed=setting.managed,
            average=self._average,
            position=self.position,
            world=setting.world,
            identity=setting.identity,
        )
        self._stopwatch = Stopwatch()
        self._guard = Guard(dmp, task.model, config, setting.world, setting.failed, self._stopwatch)
        self._pipeline = build_pipeline(dmp, self._optimizer, config, setting.world, self._guard)
        self._reporter = Reporter(self.position, setting.world, setting.observer, setting.stop_asked, self._numbers)
        newest = setting.checkpoints.newest() if setting.resume else None
        if newest is not None:
            self._training.restore(newest)
            if setting.world.is_main:
                setting.observer.noted(f"going on after step {self.position.step:,} from {newest}")

    def train_pass(self) -> None:
        """Train to the end of the pass under way.

        Raises:
            Stopped: a signal asked to stop before it; a checkpoint is written.
            Failure: the loss left its bounds, or that checkpoint could not be written.
        """
        position, (name, loader) = self.position, self.setting.passes[self.position.epoch]
        if position.epoch_step == 0:
            position.loss_sum, position.loss_steps = 0.0, 0
        if self.setting.world.is_main:
            self.setting.observer.pass_started(name, len(loader), position.epoch_step)
        self.dmp.train()
        batches = loader.epoch(position.epoch, position.epoch_step)
        while position.epoch_step < len(loader):
            self._run(batches, self._segment_end(len(loader)) - position.epoch_step, len(loader))
            # Not after the last step: rows that change hands start with random weights, which would stay.
            if position.step % self._managed_steps == 0 and position.step < self._steps:
                fresh = self.setting.managed.update(self.dmp, self._optimizer)
                if self._average is not None:
                    self._average.renew(fresh)
            if self._reporter.stopping:
                self.save()
                self.setting.checkpoints.wait()
                if not self.setting.checkpoints.has(step_name(position.step)):
                    raise Failure(f"stopped after step {position.step:,}, and its checkpoint could not be written")
                raise Stopped(f"stopped after step {position.step:,}")
            if position.step % self._train.checkpoint_steps == 0 and position.epoch_step < len(loader):
                self.save()
        position.epoch, position.epoch_step = position.epoch + 1, 0
        set_progress(self.network, position.epoch / len(self.setting.passes))

    @contextmanager
    def published(self) -> Iterator[None]:
        """For the length of a block, between passes, the model is what training would end with, and may be called.

        Its weights are the averages where there are some, and its running statistics those of evaluation.
        """
        setting, done = self.setting, self.position.epoch
        with ExitStack() as stack:
            self._pipeline.detach()  # without its prefetched inputs
            stack.callback(self._pipeline.attach)
            if self._average is not None:
                stack.enter_context(self._average.in_place())
            if done:
                _, rows = setting.passes[done - 1]
                averaged = self._average is not None
                stack.enter_context(
                    recalibrated(self.dmp, self.network, rows, setting.world, setting.managed, averaged=averaged)
                )
            yield

    def save(self) -> None:
        """A checkpoint of where training is."""
        if self.setting.world.is_main:
            self.setting.observer.checkpoint_follows()
        self.setting.checkpoints.save(step_name(self.position.step), self._training.tensors(), self._training.state())

    def keep_as_best(self, value: float | None = None) -> None:
        """What is `published` after the pass that is done becomes what training ends with, as `value` has decided."""
        position = self.position
        name = best_name(position.epoch - 1)
        tensors = {"model": self.dmp.state_dict(), "id_maps": self.setting.managed.state_dict()}
        self.setting.checkpoints.save(name, {key: found for key, found in tensors.items() if found}, {"best": name})
        position.best, position.best_epoch, position.best_value = name, position.epoch - 1, value

    def _segment_end(self, steps: int) -> int:
        """The pass's step at which no batch may be in flight: a checkpoint, new rows for ids, or the pass's end."""
        position = self.position
        managed_steps = [] if self.setting.managed.is_empty else [self._managed_steps]
        left = min(every - position.step % every for every in [self._train.checkpoint_steps, *managed_steps])
        return min(steps, position.epoch_step + left)

    def _run(self, batches: Iterator[Batch], steps: int, of: int) -> None:
        """So many steps, or fewer where a signal asks to stop: then those in flight are done and no more are begun."""
        position = self.position
        feed = self._until_stopped(islice(batches, steps))
        self._reporter.begin()
        for _ in range(steps):
            set_progress(self.network, (position.epoch + position.epoch_step / of) / len(self.setting.passes))
            self.schedule.begin_step(position.step)
            self._guard.step = position.step + 1
            try:
                output = self._pipeline.progress(feed)
            except StopIteration:
                break
            position.step, position.epoch_step = position.step + 1, position.epoch_step + 1
            if self._average is not None:
                with self._stopwatch.of("average"):
                    self._average.update(position.step, of)
            self._reporter.add(output, skipped=self._guard.rejected)
        self._reporter.flush()

    def _until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while not self._reporter.stopping:
            with self._stopwatch.of("load"):
                batch = next(batches, None)
                ready = None if batch is None else self.setting.managed.observe(batch)
            if ready is None:
                return
            yield ready

    def _numbers(self, steps: int) -> dict[str, float]:
        """What is recorded beside the losses of the last so many steps."""
        rate = float(self._optimizer.param_groups[0]["lr"])  # the network's
        return {"learning_rate": rate, **self._stopwatch.taken(steps)}
