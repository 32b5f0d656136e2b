"""The configuration's sections of what is optimized, when and where, and of the scores: optimizer to serving."""

from typing import Literal

from pydantic import Field, model_validator

from features.validation import Frozen
from serving.calibration import Kind

Precision = Literal["fp32", "fp16", "bf16"]


class DenseOptimizer(Frozen):
    """Optimizer of the network's weights."""

    name: Literal["adam", "adamw", "sgd", "adagrad", "scale"] = Field(
        default="adam",
        description="Adam (arXiv 1412.6980), AdamW (1711.05101), SGD, Adagrad, or SCALE (2506.16659), "
        "which keeps next to no state",
    )
    lr: float = Field(default=1.0e-3, gt=0, description="learning rate")
    weight_decay: float = Field(
        default=0.0, ge=0, description="adam, sgd, adagrad: L2 penalty added to the gradient; adamw, scale: decoupled"
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="of sgd; for no other optimizer")
    normalize_and_project: bool = Field(
        default=False, description="keep the size of weights that a norm makes scale-invariant (arXiv 2407.01800)"
    )

    @model_validator(mode="after")
    def _momentum_is_of_sgd(self) -> "DenseOptimizer":
        if self.momentum and self.name != "sgd":
            raise ValueError(f"momentum is of sgd; {self.name} has none to set")
        return self


class SparseOptimizer(Frozen):
    """Optimizer of the embedding tables, fused into the backward pass."""

    name: Literal["sgd", "adagrad", "rowwise_adagrad", "adam", "partial_rowwise_adam", "lamb"] = Field(
        default="rowwise_adagrad",
        description="row-wise Adagrad keeps one statistic per row instead of one per weight; the last three need CUDA",
    )
    lr: float = Field(default=0.02, gt=0, description="learning rate")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="of the rows that a batch touched; on CUDA, but for sgd and adagrad: rowwise_adagrad adds it to "
        "the gradient (L2), the others decay weights; for a CPU there is embedding_l2",
    )


class OptimizerConfig(Frozen):
    """Two optimizers: one for the network, one for the tables."""

    dense: DenseOptimizer = DenseOptimizer()
    sparse: SparseOptimizer = SparseOptimizer()
    embedding_l2: float = Field(
        default=0.0,
        ge=0,
        description="λ of λ/2 · the squared norm of a row's embeddings, added to its loss: an id pays as often as it "
        "occurs",
    )
    embedding_prior: float = Field(
        default=0.0,
        ge=0,
        description="λ of λ/2 · the squared norm of every id's embedding, once a pass over the data however often the "
        "id occurs: the rarer an id, the nearer to 0 it stays; not of managed ids",
    )


class ScheduleConfig(Frozen):
    """The course of both learning rates: a factor from 0 to 1."""

    name: Literal["constant", "linear", "cosine", "plateau"] = Field(
        default="constant",
        description="linear and cosine fall to `final` at the last step; plateau falls when validation stalls",
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the factor rises from 0")
    final: float = Field(default=0.0, ge=0, lt=1, description="linear, cosine: the factor at the end")
    factor: float = Field(default=0.5, gt=0, lt=1, description="plateau: what the rates are multiplied by")
    patience: int = Field(default=1, ge=1, description="plateau: epochs without improvement before that")


class TableSharding(Frozen):
    """How one table is placed; what is null is as `sharding` says, or the planner's choice."""

    type: str | None = Field(default=None, description="sharding type")
    kernel: str | None = Field(default=None, description="compute kernel")
    dtype: Precision | None = Field(default=None, description="of the weights in training")


class ShardingConfig(Frozen):
    """Where the tables go. What a device cannot do is refused before training."""

    type: str | None = Field(
        default=None,
        description="of every table: data_parallel, table_wise, column_wise, table_column_wise; on CUDA also row_wise, "
        "table_row_wise, grid_shard; null: the planner chooses",
    )
    kernel: str | None = Field(
        default=None,
        description="of every table: dense (of data_parallel, and of no other type), fused; on CUDA also fused_uvm, "
        "fused_uvm_caching; null: the planner chooses",
    )
    dtype: Precision = Field(
        default="fp32", description="of the tables' weights in training: fp32 or fp16; FBGEMM trains no bf16 ones"
    )
    tables: dict[str, TableSharding] = Field(
        default={}, description="`type`, `kernel` and `dtype` of single tables, by name: `{item_id: {type: row_wise}}`"
    )


class ServingConfig(Frozen):
    """What a bundle is to know about its serving."""

    fast: bool = Field(
        default=True,
        description="check after training which fast backends may serve the model, on the validation split (of days, "
        "on the last one)",
    )
    check_rows: int = Field(default=200_000, ge=1, description="rows that are scored for it, at most")


class CalibrationConfig(Frozen):
    """The last step to a served score."""

    method: Kind = Field(
        default="none",
        description="curve over the scores, fitted on the validation split after training; rankings keep their order",
    )
