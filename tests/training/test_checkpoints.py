"""A training that stops and goes on ends as one that never stopped; damaged or failed checkpoints cost no more."""

import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from features.dataset import PreparedDataset
from features.errors import InputError
from training.config import Config, load_config
from training.distributed import join_world
from training.errors import Failure, Stopped
from training.fit import epochs
from training.fit.dataset import FitResult, Going, fit_dataset
from training.progress import Silent

CONFIG = Path(__file__).parents[2] / "training" / "configs" / "movielens.yaml"
SMALL = ["model.block_width=16", "model.head=[8]", "model.embedding_dim=8", "model.blocks=2", "train.batch_size=512"]
STEPS = 9  # of an epoch: 4,800 rows


class Listener(Silent):
    """Remembers what a person would be told, and stops training after a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.told: list[str] = []
        self.step = 0
        self._stop_after = stop_after

    def noted(self, message: str) -> None:
        self.told.append(message)

    def asked(self) -> bool:
        return self._stop_after is not None and self.step >= self._stop_after

    def steps_done(
        self, step: int, losses: list[float], auc: float | None, samples_per_second: float, **numbers: float
    ) -> None:
        self.step = step


def small(*overrides: str) -> Config:
    return load_config(CONFIG, [*SMALL, "train.epochs=3", "train.checkpoint_steps=4", *overrides])


def run(
    config: Config, dataset: PreparedDataset, folder: Path, listener: Listener, *, resume: bool = False
) -> FitResult:
    with join_world() as world:
        going = Going(checkpoints=folder, failed=folder, observer=listener, resume=resume, stop_asked=listener.asked)
        return fit_dataset(config, dataset, world, going)


def same_bits(left: FitResult, right: FitResult) -> None:
    assert left.weights is not None
    assert right.weights is not None
    for mine, other in [(left.weights.network, right.weights.network), (left.weights.tables, right.weights.tables)]:
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert left.position.history == right.position.history
    assert left.position.best_epoch == right.position.best_epoch


VARIANTS = {
    "adam, row-wise, averages and their statistics": [
        "train.average={name: ema, span: 0.7}",
        "model.hidden_norm=batch",
        "model.dropout=0.3",
        "model.embedding_dropout=0.2",
    ],
    "adam, row-wise": ["model.dropout=0.3"],
    "power, adagrad, plateau": [
        "model.hidden_norm=power",
        "optimizer.sparse.name=adagrad",
        "schedule={name: plateau, warmup_steps: 5}",
        "model.dropout=0.2",
        "model.kind=serial",
        "model.head=[]",
    ],
    "prepbn, scale, cosine": [
        "model.hidden_norm=prepbn",
        "optimizer.dense.name=scale",
        "optimizer.sparse.name=sgd",
        "schedule.name=cosine",
    ],
}


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(keys, id=name, marks=[pytest.mark.long] if place else [])
        for place, (name, keys) in enumerate(VARIANTS.items())
    ],
)
def test_what_was_stopped_twice_ends_bit_for_bit_as_what_was_not(
    dataset: PreparedDataset, tmp_path: Path, overrides: list[str]
) -> None:
    config = small(*overrides)
    whole = run(config, dataset, tmp_path / "whole", Listener())
    for stop_after in (4, 13):
        listener = Listener(stop_after)
        with pytest.raises(Stopped):
            run(config, dataset, tmp_path / "cut", listener, resume=True)
        assert stop_after <= listener.step < whole.position.step
    listener = Listener()
    same_bits(whole, run(config, dataset, tmp_path / "cut", listener, resume=True))
    assert "going on after step" in listener.told[0]


def test_the_newest_and_the_best_are_kept(dataset: PreparedDataset, tmp_path: Path) -> None:
    fitted = run(
        small("train.keep_checkpoints=1", "train.epochs=6", "train.batch_size=2048"), dataset, tmp_path, Listener()
    )
    last, best = fitted.position.step, fitted.position.best_epoch
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"best-{best:06d}", f"step-{last:012d}"]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(dataset: PreparedDataset, tmp_path: Path) -> None:
    config = small()
    whole = run(config, dataset, tmp_path / "whole", Listener())
    with pytest.raises(Stopped):
        run(config, dataset, tmp_path / "cut", Listener(14))
    newest, before = sorted((tmp_path / "cut").glob("step-*"), reverse=True)
    shard = next(newest.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    listener = Listener()
    same_bits(whole, run(config, dataset, tmp_path / "cut", listener, resume=True))
    assert f"{newest} is damaged: {shard.name} is not what was written" in listener.told[0]
    assert str(before) in listener.told[1]


@contextmanager
def full_disk() -> Iterator[None]:
    """Files cannot grow beyond 4 kB; what the operating system says then is EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Filling(Listener):
    """The disk is full from step 6 until a later one."""

    def __init__(self, stack: ExitStack, until: int) -> None:
        super().__init__()
        self._stack, self._until = stack, until

    def steps_done(
        self, step: int, losses: list[float], auc: float | None, samples_per_second: float, **numbers: float
    ) -> None:
        if self.step < 6 <= step:
            self._stack.enter_context(full_disk())
        if step >= self._until:
            self._stack.close()
        super().steps_done(step, losses, auc, samples_per_second, **numbers)


def test_a_full_disk_ends_checkpoints_and_not_training(dataset: PreparedDataset, tmp_path: Path) -> None:
    whole = run(small(), dataset, tmp_path / "whole", Listener())
    with ExitStack() as stack:
        listener = Filling(stack, until=28)  # the last epoch is nearly over
        same_bits(whole, run(small(), dataset, tmp_path / "full", listener))
    assert all("could not be written" in told for told in listener.told)
    assert {"step-000000000008", "best-000000"} <= {Path(told.split()[0]).name for told in listener.told}
    assert not list((tmp_path / "full").glob("*.partial"))


def test_a_disk_that_stays_full_costs_the_result(dataset: PreparedDataset, tmp_path: Path) -> None:
    with full_disk(), pytest.raises(Failure, match="best epoch's weights could not be written"):
        run(small("train.epochs=1"), dataset, tmp_path, Listener())


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["train.seed=2"], r"with another train.seed \(1, and not 2\)"),
        (["optimizer.dense.lr=0.1"], "with another optimizer.dense.lr"),
    ],
)
def test_another_training_is_not_gone_on_with(
    dataset: PreparedDataset, tmp_path: Path, overrides: list[str], reason: str
) -> None:
    with pytest.raises(Stopped):
        run(small(), dataset, tmp_path, Listener(4))
    with pytest.raises(InputError, match=reason):
        run(small(*overrides), dataset, tmp_path, Listener(), resume=True)
    with pytest.raises(Stopped):  # what does not change the result may change
        run(small("train.checkpoint_steps=3", "train.keep_checkpoints=5"), dataset, tmp_path, Listener(8), resume=True)


def test_a_later_best_epoch_takes_the_place_of_one_that_could_not_be_written(
    dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both of the first two epochs are the best so far, and neither can be written when it is."""
    values = iter([0.6, 0.5, 0.7])
    monkeypatch.setattr(epochs, "validate", lambda *_: {"logloss": next(values), "auc": 0.5})

    with ExitStack() as stack:
        fitted = run(small(), dataset, tmp_path, Filling(stack, until=24))
    assert fitted.position.best_epoch == 1
    assert fitted.weights is not None
    assert sorted(path.name for path in tmp_path.glob("best-*")) == ["best-000001"]


def test_a_stop_whose_checkpoint_cannot_be_written_is_no_stop(dataset: PreparedDataset, tmp_path: Path) -> None:
    with full_disk(), pytest.raises(Failure, match=r"stopped after step \d+, and its checkpoint could not be written"):
        run(small(), dataset, tmp_path, Listener(4))


@pytest.mark.parametrize("left", [".partial", ".before"])
def test_what_a_kill_in_a_rename_has_left_is_gone_on_with(dataset: PreparedDataset, tmp_path: Path, left: str) -> None:
    whole = run(small(), dataset, tmp_path / "whole", Listener())
    with pytest.raises(Stopped):
        run(small("train.keep_checkpoints=1"), dataset, tmp_path / "cut", Listener(14))
    [only] = (tmp_path / "cut").glob("step-*")
    only.rename(only.with_suffix(left))
    listener = Listener()
    same_bits(whole, run(small(), dataset, tmp_path / "cut", listener, resume=True))
    assert listener.told == [f"going on after step 20 from {only.with_suffix(left)}"]


def test_damaged_checkpoints_alone_are_not_begun_from_anew(dataset: PreparedDataset, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(small(), dataset, tmp_path, Listener(4))
    for state in tmp_path.glob("step-*/state.json"):
        state.write_text("{}")
    with pytest.raises(InputError, match=r"state\.json is not what was written, and there is no other: begin anew"):
        run(small(), dataset, tmp_path, Listener(), resume=True)


def test_a_table_that_moves_out_of_data_parallel_is_told_in_a_line(dataset: PreparedDataset, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(small("sharding.type=data_parallel"), dataset, tmp_path, Listener(4))
    with pytest.raises(InputError, match="does not fit this sharding plan"):
        run(small("sharding.type=table_wise"), dataset, tmp_path, Listener(), resume=True)


def test_the_stages_of_steps_are_told_and_are_parts_of_their_time(dataset: PreparedDataset, tmp_path: Path) -> None:
    told: list[dict[str, float]] = []

    class Telling(Listener):
        def steps_done(
            self, step: int, losses: list[float], auc: float | None, samples_per_second: float, **numbers: float
        ) -> None:
            told.append({"ms": 1e3 * 512 / samples_per_second, **numbers})

    run(small("train.epochs=1", "schedule.warmup_steps=100"), dataset, tmp_path, Telling())
    stages = ["ms_load", "ms_forward", "ms_backward", "ms_optimizer"]
    assert set(told[0]) == {"ms", "learning_rate", "skipped_batches", *stages}
    for numbers in told[:2]:  # the last one has a smaller batch
        assert min(numbers[stage] for stage in stages) > 0
        assert sum(numbers[stage] for stage in stages) < numbers["ms"] * 1.01
    rate = load_config(CONFIG, []).optimizer.dense.lr
    assert told[0]["learning_rate"] == pytest.approx(rate * 4 / 100)  # of the fourth step
