"""Training over days: each is scored, then trained on once (progressive validation, McMahan et al., KDD 2013)."""

from collections.abc import Callable
from pathlib import Path

from features.dataset import PreparedDataset
from features.errors import InputError
from training.distributed import from_rank_0
from training.fit.loop import Loop
from training.fit.state import Position

Score = Callable[[int], dict[str, float | None]]


def open_data(paths: list[Path]) -> list[PreparedDataset]:
    """The prepared data sets in the given folders, in order: each is one, or a folder of them named key=value.

    Raises:
        InputError: a folder is neither; of several data sets one has a validation split, or another encoding.
    """
    found = [PreparedDataset.open(folder) for path in paths for folder in _folders(path)]
    for dataset in found[1:]:
        if dataset.pipeline.digest != found[0].pipeline.digest:
            raise InputError(
                f"prepared data {dataset.path} was encoded by another pipeline than {found[0].path}: prepare all days "
                "with --pipeline MODEL"
            )
        if dataset.schema.sampling_rate != found[0].schema.sampling_rate:
            raise InputError(
                f"prepared data {dataset.path} keeps another share of negatives ({dataset.schema.sampling_rate}) than "
                f"{found[0].path} ({found[0].schema.sampling_rate}): a model's scores are corrected by one"
            )
    for dataset in found:
        if len(found) > 1 and is_whole(dataset):
            raise InputError(
                f"prepared data {dataset.path} has a validation split: several data sets are days, each of which is "
                "scored before it is trained on; prepare them with --train alone"
            )
    return found


def is_whole(dataset: PreparedDataset) -> bool:
    """Whether a data set has splits to validate and test on; without, it is a day."""
    return "valid" in dataset.splits


def scored_rows(day: PreparedDataset) -> tuple[str, float]:
    """The split of a day that is scored before it is trained on, and the kept share of negatives to correct scores by.

    Training rows stand as they are: where they have lost negatives, the uncorrected score is that of such rows.

    Raises:
        InputError: there is nothing to train on.
    """
    if "train" not in day.splits:
        raise InputError(f"prepared data {day.path} has no split 'train' to train on")
    return ("test", day.schema.sampling_rate) if "test" in day.splits else ("train", 1.0)


def told_split(dataset: PreparedDataset) -> str:
    """The split whose rows tell of a finished model: the validation split or, of a day, what `scored_rows` names."""
    return "valid" if is_whole(dataset) else scored_rows(dataset)[0]


def fit_days(loop: Loop, names: list[str], score: Score) -> Position:
    """Score and train on each day in turn; every rank must call this.

    Args:
        loop: a training whose passes are the days.
        names: what the days are called.
        score: metrics of a day by the model as it is, on rank 0; every rank calls it.

    Raises:
        Failure: the loss left its bounds.
        Stopped: a signal has asked for it; a checkpoint is written.
    """
    position, setting = loop.position, loop.setting
    while position.epoch < len(setting.passes):
        day = position.epoch
        if len(position.history) == day:  # or training goes on in the middle of it
            with loop.published():
                metrics = from_rank_0(score(day))
            assert metrics is not None  # rank 0 has some
            if (loss := metrics.get("logloss")) is not None:
                loop.schedule.epoch_done(loss)
            position.history.append(metrics)
            if setting.world.is_main:
                setting.observer.day_scored(names[day], day, position.step, metrics)
        loop.train_pass()
        if position.epoch == len(setting.passes):
            with loop.published():
                loop.keep_as_best()
        loop.save()
    setting.checkpoints.wait()
    return position


def _folders(path: Path) -> list[Path]:
    days = sorted(folder for folder in path.glob("*=*") if folder.is_dir())
    return days if days and not (path / "manifest.json").exists() else [path]
