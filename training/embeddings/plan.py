"""The sharding plan for people: what lies where, how much memory it takes, and what depends on it."""

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console, Group
from rich.filesize import decimal
from rich.table import Table as Grid
from rich.text import Text
from torchrec.distributed.types import ParameterSharding, ShardingPlan

from features.dataset import PreparedDataset
from features.errors import InputError
from masknet.model import MaskNet, Table, table_key
from serving.bundle import fields_of, tables_of
from training.config import Config
from training.embeddings.placement import BY_COLUMNS, OF_WHOLE_ROWS, Placement, placements
from training.embeddings.sharding import plan_offline

_BYTES = {"fp32": 4, "fp16": 2}
_CUT = (*BY_COLUMNS, "grid_shard")


@dataclass(frozen=True)
class PlacedShard:
    """A rank's part of a table, and the memory of its weights and of their state: the optimizer's, and averages."""

    rank: int
    rows: int
    columns: int
    weight_bytes: int
    state_bytes: int

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.state_bytes


@dataclass(frozen=True)
class PlacedTable:
    """A table and where it lies."""

    name: str
    rows: int
    dim: int
    dtype: str
    type: str
    kernel: str
    shards: tuple[PlacedShard, ...]


@dataclass(frozen=True)
class Plan:
    """A sharding plan with names and sizes."""

    device: str
    world_size: int
    tables: tuple[PlacedTable, ...]
    notes: tuple[str, ...]

    @property
    def rank_bytes(self) -> list[int]:
        """Bytes of tables and their state, by rank."""
        shards = [shard for table in self.tables for shard in table.shards]
        return [sum(shard.bytes for shard in shards if shard.rank == rank) for rank in range(self.world_size)]

    @property
    def balance(self) -> float:
        """The fullest rank's bytes over the mean: 1 is even."""
        return max(self.rank_bytes) * self.world_size / sum(self.rank_bytes)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "rank_bytes": self.rank_bytes, "balance": self.balance}


def plan_training(config: Config, dataset: PreparedDataset, *, world_size: int, per_machine: int) -> Plan:
    """The plan of a training in so many processes, none of which is needed for it.

    Raises:
        InputError: the device cannot do what the configuration asks for, or the tables do not fit.
    """
    tables = tables_of(dataset.pipeline)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with torch.device("meta"):
            model = MaskNet(config.model, tables, fields_of(dataset.pipeline), device="meta")
    except ValueError as error:
        raise InputError(f"config: model: {error}") from None
    plan = plan_offline(model, tables, config, device, world_size=world_size, per_machine=per_machine)
    return described(plan, tables, config, device, world_size)


def described(plan: ShardingPlan, tables: tuple[Table, ...], config: Config, device: str, world_size: int) -> Plan:
    """TorchRec's plan, as the configuration and the tables explain it."""
    asked = placements(config, tables, world_size, device)
    found: dict[str, ParameterSharding] = {}
    for module in plan.plan.values():
        found |= dict(module)
    keys = [table_key(index) for index in range(len(tables))]
    placed = tuple(_placed(asked[key], found[key], config, world_size) for key in keys)
    return Plan(device, world_size, placed, tuple(_notes(placed, config, device)))


def plan_text(plan: Plan) -> str:
    """The plan as plain text, for a file."""
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(plan_tables(plan))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plan_tables(plan: Plan) -> Group:
    """The plan as tables for a terminal: a row per table, a row per rank, and notes."""
    by_table = Grid(title=f"tables on {plan.world_size} × {plan.device}", title_justify="left", box=box.SIMPLE)
    for name in ("table", "rows", "dim", "dtype", "type", "kernel", "ranks: rows × columns", "bytes"):
        by_table.add_column(name, justify="right" if name in ("rows", "dim", "bytes") else "left")
    for table in plan.tables:
        size = decimal(sum(shard.bytes for shard in table.shards))
        sizes = (f"{table.rows:,}", str(table.dim))
        by_table.add_row(Text(table.name), *sizes, table.dtype, table.type, table.kernel, _where(table.shards), size)
    by_rank = Grid(title="bytes by rank", title_justify="left", box=box.SIMPLE)
    for name in ("rank", "weights", "state", "together"):
        by_rank.add_column(name, justify="right")
    for rank in range(plan.world_size):
        own = [shard for table in plan.tables for shard in table.shards if shard.rank == rank]
        weights, states = sum(shard.weight_bytes for shard in own), sum(shard.state_bytes for shard in own)
        by_rank.add_row(str(rank), *(decimal(size) for size in (weights, states, weights + states)))
    balance = Text(f"balance: the fullest rank has {plan.balance:.2f} × the mean")
    return Group(by_table, by_rank, balance, *(Text(f"note: {note}", style="yellow") for note in plan.notes))


def _where(shards: tuple[PlacedShard, ...]) -> str:
    """Shards of the same size on neighbouring ranks in a line."""
    lines: list[list[PlacedShard]] = []
    for shard in sorted(shards, key=lambda shard: shard.rank):
        last = lines[-1][-1] if lines else None
        if last and shard.rank == last.rank + 1 and (shard.rows, shard.columns) == (last.rows, last.columns):
            lines[-1].append(shard)
        else:
            lines.append([shard])
    ranks = [str(line[0].rank) + (f"–{line[-1].rank}" if len(line) > 1 else "") for line in lines]
    return "\n".join(f"{r}: {line[0].rows:,} × {line[0].columns}" for r, line in zip(ranks, lines, strict=True))


def _placed(asked: Placement, found: ParameterSharding, config: Config, world_size: int) -> PlacedTable:
    table, dim = asked.table, config.model.embedding_dim
    if found.sharding_spec is None:  # data_parallel
        parts = [(rank, table.rows, dim) for rank in range(world_size)]
    else:
        spec: Any = found.sharding_spec  # whose shards know a rank each
        parts = [(shard.placement.rank(), *shard.shard_sizes) for shard in spec.shards]
    shards = tuple(
        PlacedShard(rank, rows, columns, rows * columns * _BYTES[asked.dtype], _state_bytes(config, rows, columns))
        for rank, rows, columns in parts
    )
    return PlacedTable(table.name, table.rows, dim, asked.dtype, found.sharding_type, found.compute_kernel, shards)


def _state_bytes(config: Config, rows: int, columns: int) -> int:
    """Of an optimizer's state and of averages in fp32, for a shard of so many rows and columns."""
    per_weight = {"adagrad": 1, "adam": 2, "lamb": 2, "partial_rowwise_adam": 1}
    per_row = {"rowwise_adagrad": 1, "partial_rowwise_adam": 1}
    name = config.optimizer.sparse.name
    averages = int(config.train.average.name != "none")
    return 4 * rows * (columns * (per_weight.get(name, 0) + averages) + per_row.get(name, 0))


def _notes(tables: tuple[PlacedTable, ...], config: Config, device: str) -> list[str]:
    """What of the result, or of the way to it, depends on the plan."""
    sparse = config.optimizer.sparse
    cut = _names(tables, lambda t: t.type in _CUT and any(shard.columns < t.dim for shard in t.shards))
    whole = _names(tables, lambda t: t.type == "data_parallel")
    half = _names(tables, lambda t: t.dtype == "fp16")
    notes = []
    if cut and sparse.name in OF_WHOLE_ROWS:
        notes.append(
            f"{cut}: {sparse.name} keeps a number per row and shard, so that with another number of shards "
            "training is another one, and a checkpoint resumes with this number only"
        )
    if whole:
        notes.append(f"{whole}: every step exchanges a gradient as large as the table, on every rank")
    if whole and sparse.weight_decay:
        notes.append(f"{whole}: weight decay is of all rows in every step, not of those that a batch touched")
    if half and device == "cuda":
        notes.append(f"{half}: fp16 weights are rounded by chance, so that no two trainings are the same")
    return notes


def _names(tables: tuple[PlacedTable, ...], is_one: Callable[[PlacedTable], bool]) -> str:
    names = [table.name for table in tables if is_one(table)]
    return "all tables" if len(names) == len(tables) else ", ".join(names)
