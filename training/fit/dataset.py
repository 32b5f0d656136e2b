"""From a configuration and data to weights: common to `masknet train` and every run of `masknet ablate`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from features.allocator import keep_freed_memory
from features.dataset import PreparedDataset
from features.loader import BatchLoader, Share
from features.pipeline import FeaturePipeline
from masknet.model import MaskNet, Table, initial_rows, split_weights
from serving.bundle import tables_of
from training.config import Config
from training.distributed import World
from training.embeddings.managed import ManagedIds
from training.embeddings.plan import described, plan_text
from training.embeddings.prior import EmbeddingPrior, count_ids
from training.embeddings.sharding import fill_tables, gather_tables, shard
from training.fit.checkpoints import Checkpoints, plain_tensors, read_whole, verify
from training.fit.days import fit_days
from training.fit.epochs import fit_epochs
from training.fit.identity import identity_of
from training.fit.loop import Loop
from training.fit.observer import Observer
from training.fit.precision import set_precision
from training.fit.setting import Setting
from training.fit.starting import Start, Weights, prepare_model
from training.fit.state import Position
from training.fit.task import ClickTask

VALID_BATCH = 8192
Evaluate = Callable[[Weights, int], dict[str, float | None]]


@dataclass(frozen=True)
class FitResult:
    """What training ended with; the weights are the best epoch's, on rank 0, and None elsewhere."""

    position: Position
    weights: Weights | None


@dataclass(frozen=True, kw_only=True)
class Going:
    """How a training goes: where its checkpoints are, who is told, and whether it goes on or begins.

    Attributes:
        checkpoints: folder of the checkpoints, the same on every rank.
        failed: folder for a batch that ends training.
        observer: told of what happens.
        resume: whether to go on from the newest checkpoint, if there is one.
        stop_asked: whether this process was asked to stop.
    """

    checkpoints: Path
    failed: Path
    observer: Observer
    resume: bool = False
    stop_asked: Callable[[], bool] = lambda: False


def fit_dataset(
    config: Config, dataset: PreparedDataset, world: World, going: Going, start: Start | None = None
) -> FitResult:
    """Train on a data set's training split until its validation split says stop; every rank must call this.

    Raises:
        InputError: too many ranks for the batches, or the model to start from cannot be trained so.
        Failure: the loss left its bounds, or validation has no metric.
        Stopped: a signal has asked for it.
    """
    sampling = dataset.schema.negative_sampling
    loader = _training_loader(config, dataset, world)
    passes = [(f"epoch {epoch + 1}", loader) for epoch in range(config.train.epochs)]
    valid = BatchLoader(dataset.files("valid"), dataset.pipeline, batch_size=VALID_BATCH, share=_share(world))
    with _loop(config, [dataset], passes, world, going, start) as loop:
        position = fit_epochs(loop, valid, config.train.early_stop, sampling.rate if sampling else 1.0)
        return _result(position, loop, dataset)


def fit_data_of_days(
    config: Config,
    days: list[PreparedDataset],
    world: World,
    going: Going,
    start: Start | None,
    evaluate: Evaluate,
) -> FitResult:
    """Train on one day after the other, once on each; every rank must call this.

    Args:
        config: what to train.
        days: data sets of one pipeline.
        world: this process.
        going: how training goes.
        start: the model to go on from.
        evaluate: metrics of weights on a day, by its number; called on rank 0, before the day is trained on.

    Raises:
        InputError: as `fit_dataset`.
        Failure: the loss left its bounds.
        Stopped: a signal has asked for it.
    """
    names = [day.path.name for day in days]
    passes = [(name, _training_loader(config, day, world)) for name, day in zip(names, days, strict=True)]
    with _loop(config, days, passes, world, going, start) as loop:

        def score(day: int) -> dict[str, float | None]:
            weights = _gathered(loop)
            return evaluate(weights, day) if world.is_main else {}

        return _result(fit_days(loop, names, score), loop, days[0])


@contextmanager
def _loop(
    config: Config,
    data: list[PreparedDataset],
    passes: list[tuple[str, BatchLoader]],
    world: World,
    going: Going,
    start: Start | None,
) -> Iterator[Loop]:
    """The sharded model, its start and its checkpoints, as a training that can begin or go on."""
    dmp, managed = _sharded(config, data[0], [loader for _, loader in passes], world, going.observer, start)
    checkpoints = Checkpoints(going.checkpoints, config.train.keep_checkpoints, world, going.observer.noted)
    setting = Setting(
        passes=passes,
        managed=managed,
        checkpoints=checkpoints,
        failed=going.failed,
        world=world,
        observer=going.observer,
        stop_asked=going.stop_asked,
        resume=going.resume,
        identity=identity_of(config, data, start),
    )
    try:
        yield Loop(dmp, config, setting)
    finally:
        checkpoints.close()


def _sharded(
    config: Config,
    dataset: PreparedDataset,
    loaders: list[BatchLoader],
    world: World,
    observer: Observer,
    start: Start | None,
) -> tuple[DistributedModelParallel, ManagedIds]:
    """The task over all processes with the weights to start from, and the managed ids' rows."""
    keep_freed_memory()
    set_precision(config.train.precision, world.device)
    train, shape, device = config.train, config.model, world.device.type
    tables, model = tables_of(dataset.pipeline), prepare_model(config, dataset, start)
    task = ClickTask(
        model,
        train.precision,
        device,
        embedding_l2=config.optimizer.embedding_l2,
        prior=_prior(config.optimizer.embedding_prior, model, dataset.pipeline, loaders, world),
        embedding_dropout=shape.embedding_dropout,
    )
    dmp = shard(task, tables, config, world, frozen=train.train_only_affine)
    if world.is_main:
        plan = described(dmp.plan, tables, config, device, world.size)
        observer.planned(plan_text(plan), plan.notes)
    given, dim, std = start.weights if start is not None else None, shape.embedding_dim, shape.embedding_init

    def rows_of(table: Table) -> torch.Tensor:
        return given.tables[table.name] if given is not None else initial_rows(table, dim, train.seed, std)

    fill_tables(dmp, tables, rows_of)
    managed = ManagedIds(
        dataset.pipeline, tables, dim=dim, seed=train.seed, world=world, frozen=train.train_only_affine, std=std
    )
    if given is not None:
        managed.start_from(given.id_maps)
    if world.size > 1:  # dropout draws by process; how much was drawn before depends on the plan
        torch.manual_seed(train.seed * 1_000_003 + world.rank)
    return dmp, managed


def _prior(
    strength: float, model: MaskNet, pipeline: FeaturePipeline, loaders: list[BatchLoader], world: World
) -> EmbeddingPrior | None:
    if not strength:
        return None
    splits = [loader.split for loader in dict.fromkeys(loaders)]  # epochs have one loader, days one each
    return EmbeddingPrior(strength, count_ids(splits, pipeline, world), model.field_names, world.device)


def _share(world: World) -> Share:
    return Share(rank=world.rank, world=world.size)


def _training_loader(config: Config, dataset: PreparedDataset, world: World) -> BatchLoader:
    files, train = dataset.files("train"), config.train
    return BatchLoader(
        files, dataset.pipeline, batch_size=train.batch_size, share=_share(world), shuffle_seed=train.seed
    )


def _result(position: Position, loop: Loop, dataset: PreparedDataset) -> FitResult:
    assert position.best is not None  # or it would have failed
    best = loop.setting.checkpoints.folder / position.best
    is_main = loop.setting.world.is_main
    return FitResult(position, _read_weights(best, dataset, loop.setting.managed) if is_main else None)


def _gathered(loop: Loop) -> Weights:
    """The weights as they are, whole on rank 0; every rank must call this."""
    tables = gather_tables(loop.dmp, loop.model.table_names)
    return Weights(loop.model.dense_state(), tables, loop.setting.managed.frozen())


def _read_weights(best: Path, dataset: PreparedDataset, managed: ManagedIds) -> Weights:
    """The best epoch's weights, put together from all shards; `managed` becomes what it was then."""
    verify(best)
    saved = {name: plain_tensors(best, name) for name in ("model", "id_maps")}
    read_whole(best, {name: tensors for name, tensors in saved.items() if tensors})
    managed.load_state_dict(saved["id_maps"])
    names = [table.name for table in tables_of(dataset.pipeline)]
    state = {name.removeprefix("model."): weight for name, weight in saved["model"].items()}
    network, tables = split_weights(state, len(names))
    return Weights(network, {name: table.float() for name, table in zip(names, tables, strict=True)}, managed.frozen())
