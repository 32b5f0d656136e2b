"""Managed ids in front of sharded tables: rows for new ids, and fresh rows for those that take another's.

Legend: B rows of a batch, R rows of a table, d embedding width.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from features.batches import Batch, EncodedRows
from features.encoders import Cross, Managed
from features.fitting import fit_pipeline
from features.pipeline import FeaturePipeline
from features.schema import Schema
from masknet.model import MaskNet, initial_rows
from serving.bundle import fields_of, tables_of
from training.config import AverageConfig, Config
from training.distributed import World, join_world
from training.embeddings.fresh_rows import _clear, _renew, _Shard
from training.embeddings.managed import ManagedIds
from training.embeddings.sharding import fill_tables, gather_tables, shard, unwrapped
from training.fit.average import WeightAverage
from training.fit.checkpoints import plain_tensors
from training.fit.task import ClickTask
from training.optim.optimizers import build_optimizer

ROWS, DIM, RATE = 6, 8, 0.5  # the table has room for 4 items
SCHEMA = Schema.model_validate(
    {
        "name": "managed",
        "label": {"column": "click"},
        "fields": [
            {"name": "user_x_item", "type": "cross", "of": ["user", "item"], "buckets": 9},
            {"name": "history", "type": "list", "separator": " ", "share_with": "item"},
            {"name": "item", "type": "categorical", "encoder": "managed", "buckets": ROWS},
            {"name": "user", "type": "categorical", "encoder": "managed", "buckets": 50},
        ],
    }
)
PIPELINE = FeaturePipeline.build(
    SCHEMA.fields, {"user_x_item": Cross(9), "item": Managed(ROWS, "lfu"), "user": Managed(50, "lfu")}
)
TABLES = tables_of(PIPELINE)
ITEM = "t001"


def config(optimizer: str, sharding: str) -> Config:
    return Config.model_validate(
        {
            "experiment": "managed",
            "model": {"embedding_dim": DIM, "blocks": 1, "block_width": 6, "head": []},
            "optimizer": {"sparse": {"name": optimizer, "lr": RATE}},
            "sharding": {"type": sharding},
            "tracking": {"registered_model": "managed"},
        }
    )


@pytest.fixture
def world() -> Iterator[World]:
    with join_world() as world:
        yield world


def new_ids(world: World) -> ManagedIds:
    return ManagedIds(PIPELINE, TABLES, dim=DIM, seed=1, world=world)


def sharded(settings: Config, world: World) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    torch.manual_seed(1)
    model = MaskNet(settings.model, TABLES, fields_of(PIPELINE), device="meta")
    dmp = shard(ClickTask(model, "fp32", world.device.type), TABLES, settings, world)
    fill_tables(dmp, TABLES, lambda table: initial_rows(table, DIM, 1))
    return dmp, build_optimizer(dmp, settings, model.network)


def batch_of(items: list[str | None], histories: list[str] | None = None, user: str = "u") -> Batch:
    columns = {"item": items, "history": histories or [""] * len(items), "user": [user] * len(items)}
    inputs = EncodedRows.of(PIPELINE.encode(columns), PIPELINE.layout).gather(np.arange(len(items)))
    label_B = (torch.arange(len(items)) % 2).float()
    return Batch(*inputs, label_B, torch.full((len(items),), 1 / len(items)))


def rows_of(managed: ManagedIds, *items: str | None, field: str = "item") -> list[int]:
    found: list[int] = managed.remap(batch_of(list(items))).ids[field].values().tolist()
    return found


def step(dmp: DistributedModelParallel, optimizer: CombinedOptimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    loss, _ = dmp(batch)
    loss.backward()
    optimizer.step()


def items_of(dmp: DistributedModelParallel) -> torch.Tensor:
    """The items' table [R, d]."""
    return gather_tables(dmp, [table.name for table in TABLES])["item"]


def averages_of(average: WeightAverage, dmp: DistributedModelParallel) -> torch.Tensor:
    """Of the items' table [R, d]."""
    with average.in_place():
        return items_of(dmp)


def item_state(optimizer: CombinedOptimizer) -> torch.Tensor | None:
    """What the optimizer keeps of the items' rows, [R, …], or None; of several shards by columns the first's."""
    for name, kept in optimizer.state_dict()["state"].items():
        if f"{ITEM}.weight" in name:
            values = [v for v in kept.values() if isinstance(v, torch.Tensor) and v.dim()]
            values = [v.local_shards()[0].tensor if hasattr(v, "local_shards") else v for v in values]
            return torch.cat([v.detach().reshape(ROWS, -1) for v in values], 1).clone() if values else None
    return None


def test_without_managed_fields_batches_pass_untouched(world: World) -> None:
    specs = SCHEMA.fields[:1] + tuple(
        type(field).model_validate({**field.plain(), "type": field.type, "encoder": "hash", "buckets": 7})
        for field in SCHEMA.fields[2:]
    )
    schema = Schema(name="s", label=SCHEMA.label, fields=specs)
    pipeline = fit_pipeline(schema, {"item": ["a"], "user": ["b"]})
    managed = ManagedIds(pipeline, tables_of(pipeline), dim=DIM, seed=1, world=world)
    batch = batch_of(["a"])
    assert managed.is_empty
    assert managed.observe(batch) is batch
    assert managed.remap(batch) is batch
    assert (managed.state_dict(), managed.frozen()) == ({}, {})


def test_new_ids_are_never_seen_until_the_update_and_then_have_rows(world: World) -> None:
    managed = new_ids(world)
    dmp, optimizer = sharded(config("rowwise_adagrad", "table_wise"), world)
    batch = managed.observe(batch_of(["a", "a", None, "b"], ["a c", "", "b", "c"]))
    assert batch.ids["item"].values().tolist() == [1, 1, 0, 1]
    assert batch.ids["history"].values().tolist() == [1, 1, 0, 1, 1]
    assert batch.ids["history"].lengths().tolist() == [2, 1, 1, 1]
    crossed = batch_of(["a", "a", None, "b"], ["a c", "", "b", "c"]).ids["user_x_item"]
    assert batch.ids["user_x_item"].values().tolist() == crossed.values().tolist()  # not managed: as it was
    before = items_of(dmp)
    step(dmp, optimizer, batch)
    after = items_of(dmp)
    assert (after != before).any(1).tolist() == [True, True, False, False, False, False]  # missing and never seen learn
    managed.update(dmp, optimizer)
    assert sorted(rows_of(managed, "a", "b", "c")) == [3, 4, 5]  # the list's ids have rows of the same table
    assert rows_of(managed, "d", None) == [1, 0]
    (row,) = rows_of(managed, "a")
    renewed = items_of(dmp)
    step(dmp, optimizer, managed.observe(batch_of(["a", "a"])))
    assert (items_of(dmp) != renewed).any(1).nonzero().flatten().tolist() == [0, row]  # the histories are empty


def test_validation_counts_nothing(world: World) -> None:
    managed = new_ids(world)
    dmp, optimizer = sharded(config("sgd", "table_wise"), world)
    managed.remap(batch_of(["a", "b"]))
    managed.update(dmp, optimizer)
    assert rows_of(managed, "a", "b") == [1, 1]


# fbgemm 1.8's kernel of data_parallel tables has a gradient, of which torch 2.13 does not know
@pytest.mark.filterwarnings("ignore:(?s).*an autograd kernel was not registered:UserWarning")
@pytest.mark.parametrize(
    ("optimizer", "sharding"),
    [
        ("rowwise_adagrad", "table_wise"),
        ("adagrad", "column_wise"),
        ("rowwise_adagrad", "data_parallel"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("adagrad", "table_wise"),
                ("sgd", "table_wise"),
                ("rowwise_adagrad", "column_wise"),
                ("adagrad", "data_parallel"),
            )
        ),
    ],
)
def test_rows_that_change_hands_start_anew(world: World, optimizer: str, sharding: str) -> None:
    managed = new_ids(world)
    dmp, trained_by = sharded(config(optimizer, sharding), world)
    average = WeightAverage(dmp, AverageConfig(name="ema", span=1.0))
    for items in (["a", "a", "a", "b", "b", "b", "c", "c", "d"], ["a", "b", "c", "d"], ["a", "b", "c", "d"]):
        step(dmp, trained_by, managed.observe(batch_of(list(items))))
        managed.update(dmp, trained_by)
    (cold,) = rows_of(managed, "d")
    others = [row for row in range(ROWS) if row != cold]
    step(dmp, trained_by, managed.observe(batch_of(["e"] * 6 + ["a"])))
    old, old_state = items_of(dmp), item_state(trained_by)
    average.update(4, 4)
    old_mean = averages_of(average, dmp)
    average.renew(managed.update(dmp, trained_by))
    assert rows_of(managed, "e", "d") == [cold, 1]
    new, new_state, new_mean = items_of(dmp), item_state(trained_by), averages_of(average, dmp)
    assert (new_mean[cold] == new[cold]).all()
    assert (old_mean[cold] != old[cold]).all()
    assert (new_mean[others] == old_mean[others]).all()
    assert (new[others] == old[others]).all()
    assert (new[cold] != old[cold]).all()
    assert old[cold].abs().max() > 0.1  # training has moved it far from what it started with
    assert new[cold].abs().max() < 0.05  # N(0, 0.01²)
    if optimizer == "sgd":
        assert new_state is None
    else:
        assert old_state is not None
        assert new_state is not None
        assert (old_state[cold] > 0).all()
        assert (new_state[cold] == 0).all()
        assert (new_state[others] == old_state[others]).all()
    looked_up = unwrapped(dmp).model.embeddings(managed.remap(batch_of(["e"])).ids)  # by what really trains
    value_d = looked_up.wait()["item"] if hasattr(looked_up, "wait") else looked_up["item"]
    torch.testing.assert_close(value_d[0], new[cold], rtol=0, atol=0)
    step(dmp, trained_by, managed.observe(batch_of(["e"])))
    if (optimizer, sharding) == ("rowwise_adagrad", "table_wise"):
        # g / √mean(g²) has length √d: the first step of a row that knows of no other
        moved_d = items_of(dmp)[cold] - new[cold]
        assert moved_d.norm().item() == pytest.approx(RATE * DIM**0.5, rel=1e-4)


def test_a_part_of_a_tables_rows_and_columns_takes_its_part() -> None:
    """As row_wise and grid_shard cut tables, which only CUDA does."""
    weight_Ed = torch.arange(12.0).view(3, 4) + 100
    rows_E = torch.tensor([2, 3, 7])
    shard_ = _Shard(torch.zeros(4, 2, dtype=torch.float16), 3, 2)  # rows 3 to 6, columns 2 and 3
    _renew(shard_, rows_E, weight_Ed)
    assert shard_.tensor.tolist() == [[106, 107], [0, 0], [0, 0], [0, 0]]
    kept = {"by row": torch.ones(4), "by weight": torch.ones(4, 2), "step": torch.tensor(5.0)}
    for state in kept.values():
        _clear(state, [shard_], rows_E)
    assert kept["by row"].tolist() == [0, 1, 1, 1]
    assert kept["by weight"].tolist() == [[0, 0], [1, 1], [1, 1], [1, 1]]
    assert kept["step"] == 5


def test_fresh_rows_differ_by_table_and_update_and_not_by_sharding(world: World) -> None:
    found = {}
    for sharding in ("table_wise", "column_wise"):
        managed = new_ids(world)
        dmp, optimizer = sharded(config("sgd", sharding), world)
        drawn = []
        for item in ("a", "b"):
            managed.observe(batch_of([item], user=item))
            managed.update(dmp, optimizer)
            tables = gather_tables(dmp, [table.name for table in TABLES])
            user_row = int(managed.frozen()["user"].rows_K.min())  # rows are given from the last on
            drawn += [tables["item"][rows_of(managed, item)[0]], tables["user"][user_row]]
        found[sharding] = torch.stack(drawn)
    assert len({tuple(row.tolist()) for row in found["table_wise"]}) == 4
    torch.testing.assert_close(found["column_wise"], found["table_wise"], rtol=0, atol=0)


def test_fresh_rows_have_the_deviation_that_is_asked(world: World) -> None:
    rows = {}
    for std in (0.01, 0.3):
        managed = ManagedIds(PIPELINE, TABLES, dim=DIM, seed=1, world=world, std=std)
        dmp, optimizer = sharded(config("sgd", "table_wise"), world)
        managed.observe(batch_of(["a"]))
        managed.update(dmp, optimizer)
        rows[std] = items_of(dmp)[rows_of(managed, "a")]
    torch.testing.assert_close(rows[0.3], 30 * rows[0.01], rtol=1e-5, atol=0)


def random_batches(count: int) -> list[Batch]:
    random = np.random.default_rng(3)
    names = [[f"i{i}" for i in np.minimum(random.zipf(1.5, 8), 12)] for _ in range(count)]
    return [batch_of(list(items), user=f"u{number % 5}") for number, items in enumerate(names)]


def test_a_checkpoint_between_two_updates_loses_no_count(world: World, tmp_path: Path) -> None:
    dmp, optimizer = sharded(config("sgd", "table_wise"), world)
    batches = random_batches(12)
    managed = new_ids(world)
    for number, batch in enumerate(batches[:7]):
        managed.observe(batch)
        if number % 4 == 3:
            managed.update(dmp, optimizer)
    dcp.save({"managed": managed.state_dict(), "other": {"x": torch.ones(2)}}, checkpoint_id=tmp_path / "saved")
    again = new_ids(world)
    state: dict[str, Any] = {"managed": plain_tensors(tmp_path / "saved", "managed")}
    dcp.load(state, checkpoint_id=tmp_path / "saved")
    again.load_state_dict(state["managed"])
    for ids in (managed, again):
        for batch in batches[7:]:
            ids.observe(batch)
        ids.update(dmp, optimizer)
    first, second = managed.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.tolist() == second[name].tolist(), name
    assert len(managed.frozen()["item"].ids_K) == 4
    assert len(managed.frozen()["user"].ids_K) == 5


def test_training_on_starts_with_the_map_and_its_counts(world: World) -> None:
    dmp, optimizer = sharded(config("sgd", "table_wise"), world)
    managed = new_ids(world)
    for batch in random_batches(6):
        managed.observe(batch)
    managed.update(dmp, optimizer)
    again = new_ids(world)
    again.start_from(managed.frozen())
    for ids in (managed, again):
        ids.observe(batch_of(["new", "i1"]))  # as rare as none of the known: only counts that are kept say so
        ids.update(dmp, optimizer)
    assert rows_of(again, "new", "i1") == rows_of(managed, "new", "i1")
    assert rows_of(again, "new")[0] == 1
    for name, id_map in managed.frozen().items():
        assert id_map.step == again.frozen()[name].step == 7
        assert id_map.ids_K.tolist() == again.frozen()[name].ids_K.tolist()
