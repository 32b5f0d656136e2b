"""What a plan says before training, and what is refused there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from features.dataset import PreparedDataset
from features.errors import InputError
from masknet.model import MaskNet
from serving.bundle import fields_of, tables_of
from tests.training.placed import DIM, FIELDS, TABLES, configured
from training.cli import app
from training.config import Config
from training.embeddings.plan import Plan, described, plan_text, plan_training
from training.embeddings.sharding import plan_offline
from training.sections import SparseOptimizer


def planned(world: int, sharding: dict[str, Any], sparse: str = "rowwise_adagrad", device: str = "cpu") -> Plan:
    config = configured(sharding=sharding, optimizer={"sparse": {"name": sparse}})
    with torch.device("meta"):
        model = MaskNet(config.model, TABLES, FIELDS, device="meta")
    plan = plan_offline(model, TABLES, config, device, world_size=world, per_machine=world)
    return described(plan, TABLES, config, device, world)


def shards(plan: Plan, name: str) -> list[tuple[int, int, int]]:
    (table,) = (table for table in plan.tables if table.name == name)
    return sorted((shard.rank, shard.rows, shard.columns) for shard in table.shards)


def test_the_planner_chooses_whole_tables_on_a_cpu() -> None:
    plan = planned(2, {})
    assert {(table.type, table.kernel, table.dtype) for table in plan.tables} == {("table_wise", "fused", "fp32")}
    (item,), (user,) = shards(plan, "item"), shards(plan, "user")
    assert item[1:] == (40, DIM)
    assert user[1:] == (9, DIM)
    assert {item[0], user[0]} == {0, 1}
    # weights and one statistic per row: 4 · (16 + 1) bytes a row
    assert sorted(plan.rank_bytes) == [9 * 68, 40 * 68]
    assert plan.balance == pytest.approx(40 / 24.5)
    assert plan.notes == ()


@pytest.mark.parametrize(
    ("sparse", "bytes_per_weight"), [("sgd", 2), ("adagrad", 2 + 4), ("rowwise_adagrad", 2 + 4 / 4)]
)
def test_columns_are_shared_evenly_and_bytes_are_those_of_weights_and_state(sparse: str, bytes_per_weight: int) -> None:
    plan = planned(4, {"type": "column_wise", "dtype": "fp16"}, sparse)
    assert shards(plan, "item") == [(rank, 40, 4) for rank in range(4)]
    assert shards(plan, "user") == [(rank, 9, 4) for rank in range(4)]
    assert plan.rank_bytes == [49 * 4 * bytes_per_weight] * 4
    assert plan.balance == 1.0


def test_averages_take_four_bytes_a_weight() -> None:
    config = configured(sharding={"dtype": "fp16"}, train={"average": {"name": "ema"}})
    with torch.device("meta"):
        model = MaskNet(config.model, TABLES, FIELDS, device="meta")
    plan = described(plan_offline(model, TABLES, config, "cpu", world_size=1, per_machine=1), TABLES, config, "cpu", 1)
    assert plan.rank_bytes == [49 * (DIM * (2 + 4) + 4)]  # weights, averages, and a statistic for every row


def test_tables_are_placed_one_by_one() -> None:
    tables = {"user": {"type": "data_parallel"}, "item": {"dtype": "fp16"}}
    plan = planned(3, {"type": "table_wise", "tables": tables}, "sgd")
    item, user = plan.tables
    assert (item.name, item.type, item.kernel, item.dtype) == ("item", "table_wise", "fused", "fp16")
    assert (user.name, user.type, user.kernel, user.dtype) == ("user", "data_parallel", "dense", "fp32")
    assert shards(plan, "user") == [(rank, 9, DIM) for rank in range(3)]


@pytest.mark.parametrize(
    ("sharding", "sparse", "told"),
    [
        ({"type": "column_wise"}, "rowwise_adagrad", "all tables: rowwise_adagrad keeps a number per row and shard"),
        ({"tables": {"item": {"type": "table_column_wise"}}}, "rowwise_adagrad", "item: rowwise_adagrad keeps"),
        ({"tables": {"user": {"kernel": "dense"}}}, "sgd", "user: every step exchanges a gradient as large"),
    ],
)
def test_notes_tell_what_depends_on_the_plan(sharding: dict[str, Any], sparse: str, told: str) -> None:
    (note,) = planned(2, sharding, sparse).notes
    assert note.startswith(told)
    assert f"note: {note[:60]}" in plan_text(planned(2, sharding, sparse))


def test_columns_in_one_piece_or_a_statistic_per_weight_depend_on_nothing() -> None:
    assert planned(1, {"type": "column_wise"}).notes == ()
    assert planned(2, {"type": "column_wise"}, "adagrad").notes == ()


def test_weight_decay_of_whole_tables_is_of_rows_that_no_batch_touched() -> None:
    config = configured(sharding={"type": "data_parallel"}, optimizer={"sparse": {"name": "sgd", "weight_decay": 0.1}})
    with torch.device("meta"):
        model = MaskNet(config.model, TABLES, FIELDS, device="meta")
    plan = plan_offline(model, TABLES, config, "cpu", world_size=2, per_machine=2)
    assert "weight decay is of all rows" in described(plan, TABLES, config, "cpu", 2).notes[1]


ON_CPU = "data_parallel, table_wise, column_wise, table_column_wise"


@pytest.mark.parametrize(
    ("sharding", "sparse", "told"),
    [
        ({"type": "row_wise"}, {}, f"sharding.type row_wise is not possible on cpu; there are {ON_CPU}"),
        (
            {"tables": {"item": {"type": "rows"}}},
            {},
            "sharding.tables.item.type rows is not possible on cpu; there are",
        ),
        ({"kernel": "fused_uvm"}, {}, "sharding.kernel fused_uvm is not possible on cpu; there are dense, fused"),
        ({"dtype": "bf16"}, {}, "sharding.dtype bf16 is not possible on cpu; there are fp32, fp16"),
        ({"tables": {"itm": {}}}, {}, "sharding.tables.itm is no table; there are item, user"),
        ({}, {"name": "lamb"}, "optimizer.sparse.name lamb is not possible on cpu; there are sgd, adagrad, rowwise_"),
        ({}, {"weight_decay": 0.1}, "fused rowwise_adagrad would ignore it, of table item first"),
        (
            {"tables": {"item": {"type": "data_parallel"}}},
            {"weight_decay": 0.1},
            "would ignore it, of table user first",
        ),
        (
            {"type": "data_parallel", "kernel": "fused"},
            {},
            "sharding.type data_parallel and sharding.kernel fused do not",
        ),
        ({"type": "table_wise", "kernel": "dense"}, {}, "kernel dense for type data_parallel, and for no other"),
        ({"kernel": "dense", "dtype": "fp16"}, {}, "sharding.dtype fp16 does not go with type data_parallel"),
    ],
)
def test_what_is_not_possible_is_refused_with_what_is(sharding: Any, sparse: dict[str, Any], told: str) -> None:
    config = configured(sharding=sharding, optimizer={"sparse": SparseOptimizer(**sparse).model_dump()})
    with torch.device("meta"):
        model = MaskNet(config.model, TABLES, FIELDS, device="meta")
    with pytest.raises(InputError) as error:
        plan_offline(model, TABLES, config, "cpu", world_size=2, per_machine=2)
    assert told in str(error.value)


@pytest.mark.parametrize(("dim", "world"), [(6, 2), (4, 2), (20, 2)])
def test_columns_that_cannot_be_cut_are_refused(dim: int, world: int) -> None:
    config = configured(sharding={"type": "column_wise"})
    config = config.model_copy(update={"model": config.model.model_copy(update={"embedding_dim": dim})})
    with torch.device("meta"):
        model = MaskNet(config.model, TABLES, FIELDS, device="meta")
    with pytest.raises(InputError, match=f"sharding.type column_wise: embedding_dim {dim} cannot be cut into shards"):
        plan_offline(model, TABLES, config, "cpu", world_size=world, per_machine=world)


def test_tables_that_do_not_fit_are_refused() -> None:
    config = configured()
    tables = tuple(table.__class__(**{**vars(table), "rows": 10**11}) for table in TABLES)
    with torch.device("meta"):
        model = MaskNet(config.model, tables, FIELDS, device="meta")
    with pytest.raises(
        InputError,
        match=r"3,200,000,000,000 weights of tables .* on 2 × cpu: Unable to find a plan .* insufficient storage$",
    ):
        plan_offline(model, tables, config, "cpu", world_size=2, per_machine=2)


@pytest.mark.parametrize("kind", ["row_wise", "table_row_wise", "grid_shard"])
def test_rows_are_cut_in_a_plan_for_cuda(kind: str) -> None:
    """The plan alone: it takes no GPU."""
    plan = planned(2, {"type": kind, "kernel": "fused_uvm_caching"}, "adam", "cuda")
    assert {(table.type, table.kernel) for table in plan.tables} == {(kind, "fused_uvm_caching")}
    assert sum(rows * columns for _, rows, columns in shards(plan, "item")) == 40 * DIM
    assert len(shards(plan, "item")) >= 2


def test_unknown_tables_pooling_is_refused(dataset: PreparedDataset, config: Config) -> None:
    unknown = config.model_copy(update={"model": config.model.model_copy(update={"pooling": {"genre": "sum"}})})
    with pytest.raises(InputError, match="config: model: pooling: genre is no table; there are user_id"):
        plan_training(unknown, dataset, world_size=1, per_machine=1)


def test_plan_option_prints_and_stops(data: Path, dataset: PreparedDataset, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("experiment: e\ntracking: {registered_model: m}\nsharding: {type: column_wise}\n")
    command = ["train", str(path), "--data", str(data), "--out", str(tmp_path / "out"), "--nproc", "2", "--plan"]
    answer = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    found = json.loads(answer.stdout)
    rows = {table.name: table.rows for table in tables_of(dataset.pipeline)}
    assert {table["name"]: table["rows"] for table in found["tables"]} == rows
    assert len(fields_of(dataset.pipeline)) == len(rows)
    assert found["rank_bytes"] == [sum(rows.values()) * (8 + 1) * 4] * 2
    table = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert "tables on 2 × cpu" in table
    assert "balance: the fullest rank has 1.00 × the mean" in table
    assert not (tmp_path / "out").exists()
