"""What a device can do with a table, and what a configuration asks for: checked here, before anything is placed.

Of FBGEMM 1.8 on the CPU, measured: bf16 tables have no kernel, on CUDA neither by its sources; a weight decay that is
given to a fused optimizer is dropped without a word, but for row-wise Adagrad of fp16 tables.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from torchrec.distributed.planner.types import ParameterConstraints

from features.errors import InputError
from masknet.model import Table, table_key
from training.config import Config
from training.sections import TableSharding

DENSE, IN_HOST_MEMORY = "dense", ("fused_uvm", "fused_uvm_caching")
BY_COLUMNS = ("column_wise", "table_column_wise")
OF_WHOLE_ROWS = ("rowwise_adagrad", "partial_rowwise_adam", "lamb")  # optimizers with a number per row, or shard of one
_COLUMNS = 4  # FBGEMM's vectors: a shard's width is a multiple of it
_PLANNERS_COLUMNS = 128  # the width of shards that TorchRec's planner aims at when nothing is said


@dataclass(frozen=True)
class Abilities:
    """What FBGEMM and TorchRec can do on a kind of device; `decays` are the fused optimizers with a weight decay."""

    types: tuple[str, ...]
    kernels: tuple[str, ...]
    dtypes: tuple[str, ...]
    optimizers: tuple[str, ...]
    decays: tuple[str, ...]


_CPU = Abilities(
    types=("data_parallel", "table_wise", *BY_COLUMNS),
    kernels=(DENSE, "fused"),
    dtypes=("fp32", "fp16"),
    optimizers=("sgd", "adagrad", "rowwise_adagrad"),
    decays=(),
)
_CUDA = Abilities(
    types=(*_CPU.types, "row_wise", "table_row_wise", "grid_shard"),
    kernels=(*_CPU.kernels, "fused_uvm", "fused_uvm_caching"),
    dtypes=_CPU.dtypes,
    optimizers=(*_CPU.optimizers, "adam", "partial_rowwise_adam", "lamb"),
    decays=("rowwise_adagrad", "adam", "partial_rowwise_adam", "lamb"),
)
DENSE_OPTIMIZERS = _CPU.optimizers  # those that torch has as well, with the same result


def abilities(device: str) -> Abilities:
    """Of "cpu" or "cuda"."""
    return _CUDA if device == "cuda" else _CPU


@dataclass(frozen=True)
class Placement:
    """What is asked of one table: the sharding types and kernels that may be chosen from, and the data type."""

    table: Table
    types: tuple[str, ...]
    kernels: tuple[str, ...]
    dtype: str
    shard_width: int | None  # of a table cut by columns

    @property
    def constraint(self) -> ParameterConstraints:
        """The same for TorchRec's planner."""
        return ParameterConstraints(
            sharding_types=list(self.types), compute_kernels=list(self.kernels), min_partition=self.shard_width
        )


def placements(config: Config, tables: tuple[Table, ...], world_size: int, device: str) -> dict[str, Placement]:
    """What is asked of every table, by TorchRec's name for it.

    Raises:
        InputError: a table is unknown, or the device cannot do what is asked; tells key, value and what it can.
    """
    can, asked = abilities(device), config.sharding
    names = [table.name for table in tables]
    for name in asked.tables:
        if name not in names:
            _refuse(f"sharding.tables.{name}", "is no table", names)
    _require("optimizer.sparse.name", config.optimizer.sparse.name, device, can.optimizers)
    placed = {table_key(i): _placement(config, table, world_size, device) for i, table in enumerate(tables)}
    _require_decay(config, placed.values(), device, can)
    return placed


def _placement(config: Config, table: Table, world_size: int, device: str) -> Placement:
    can, common = abilities(device), config.sharding
    own = common.tables.get(table.name, TableSharding())
    keys = {part: _key(table, part, getattr(own, part) is not None) for part in ("type", "kernel", "dtype")}
    kind, kernel, dtype = own.type or common.type, own.kernel or common.kernel, own.dtype or common.dtype
    if kind is not None:
        _require(keys["type"], kind, device, can.types)
    if kernel is not None:
        _require(keys["kernel"], kernel, device, can.kernels)
        if kernel in IN_HOST_MEMORY and config.train.average.name != "none":
            _refuse(
                f"{keys['kernel']} {kernel}",
                "does not go with train.average, which keeps averages beside the tables, in the device's memory",
                [each for each in can.kernels if each not in IN_HOST_MEMORY],
            )
    _require(keys["dtype"], dtype, device, can.dtypes)
    kinds = (kind,) if kind is not None else _chosen_from(config, device, kernel)
    kernels = (kernel,) if kernel is not None else _kernels_of(kinds, can, config)
    _require_pair(keys, kinds, kernels, dtype, config)
    width = config.model.embedding_dim
    if device == "cuda" and width % _COLUMNS:
        raise InputError(f"model.embedding_dim {width}: on cuda it has to be a multiple of {_COLUMNS}")
    cut = kind in BY_COLUMNS or kind == "grid_shard"
    return Placement(table, kinds, kernels, dtype, _shard_width(keys["type"], kind, width, world_size) if cut else None)


def _key(table: Table, part: str, is_own: bool) -> str:
    return f"sharding.tables.{table.name}.{part}" if is_own else f"sharding.{part}"


def _chosen_from(config: Config, device: str, kernel: str | None) -> tuple[str, ...]:
    """What the planner may choose from, so that the result of training does not depend on its choice.

    Not data_parallel, whose tables weight decay would treat otherwise. Not by columns with row-wise statistics, which
    would become one per row and shard, and not where the planner would leave all columns in one shard: that is
    table_wise by another name, and the choice between the two a matter of chance.
    """
    if kernel == DENSE:
        return ("data_parallel",)
    of_rows = config.optimizer.sparse.name in OF_WHOLE_ROWS
    by_columns = not of_rows and config.model.embedding_dim >= 2 * _PLANNERS_COLUMNS
    by_rows = ("row_wise", "table_row_wise") if device == "cuda" else ()
    return ("table_wise", *(BY_COLUMNS if by_columns else ()), *by_rows)


def _kernels_of(kinds: tuple[str, ...], can: Abilities, config: Config) -> tuple[str, ...]:
    if kinds == ("data_parallel",):
        return (DENSE,)
    out = (DENSE,) if config.train.average.name == "none" else (DENSE, *IN_HOST_MEMORY)
    return tuple(kernel for kernel in can.kernels if kernel not in out)


def _require_pair(
    keys: dict[str, str], kinds: tuple[str, ...], kernels: tuple[str, ...], dtype: str, config: Config
) -> None:
    """InputError where a type, a kernel, a data type and the optimizer are each possible, but not together."""
    kernel, sparse = kernels[0], config.optimizer.sparse.name
    if (kinds == ("data_parallel",)) != (kernel == DENSE):
        rule = "TorchRec has kernel dense for type data_parallel, and for no other"
        raise InputError(f"{keys['type']} {kinds[0]} and {keys['kernel']} {kernel} do not go together: {rule}")
    if kernel == DENSE and dtype != "fp32":
        _refuse(
            f"{keys['dtype']} {dtype}", "does not go with type data_parallel, whose statistics have it too", ["fp32"]
        )
    if kernel == DENSE and sparse not in DENSE_OPTIMIZERS:
        _refuse(f"optimizer.sparse.name {sparse}", "does not go with type data_parallel", list(DENSE_OPTIMIZERS))


def _shard_width(key: str, kind: str | None, width: int, world_size: int) -> int:
    """Columns of a shard: as many shards as there are ranks, or the most below that which FBGEMM takes."""
    shards = [n for n in range(1, world_size + 1) if width % (_COLUMNS * n) == 0]
    if world_size > 1 and (not shards or shards[-1] == 1):
        raise InputError(
            f"{key} {kind}: embedding_dim {width} cannot be cut into shards of equal width, a multiple of {_COLUMNS}, "
            f"for {world_size} processes"
        )
    return width // shards[-1] if shards else width


def _require_decay(config: Config, placed: Iterable[Placement], device: str, can: Abilities) -> None:
    sparse = config.optimizer.sparse
    if sparse.weight_decay and sparse.name not in can.decays:
        fused = [placement.table.name for placement in placed if placement.kernels != (DENSE,)]
        if fused:
            raise InputError(
                f"optimizer.sparse.weight_decay {sparse.weight_decay}: on {device} FBGEMM's fused {sparse.name} would "
                f"ignore it, of table {fused[0]} first; there are optimizer.embedding_l2"
                + (", type data_parallel" if sparse.name in DENSE_OPTIMIZERS else "")
                + (f", and the optimizers {', '.join(can.decays)}" if can.decays else "")
            )


def _require(key: str, value: str, device: str, choices: Iterable[str]) -> None:
    if value not in choices:
        _refuse(f"{key} {value}", f"is not possible on {device}", list(choices))


def _refuse(what: str, why: str, choices: list[str]) -> NoReturn:
    raise InputError(f"{what} {why}; there are {', '.join(choices)}")
