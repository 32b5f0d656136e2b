"""The training configuration: one YAML file, every key described here. `--set section.key=value` overrides."""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, model_validator

from features.errors import without_password
from features.validation import Frozen, load_yaml, override, validate
from masknet.config import MaskNetConfig
from masknet.norms import NORMS
from training.fit.precision import Precision
from training.sections import CalibrationConfig, OptimizerConfig, ScheduleConfig, ServingConfig, ShardingConfig

NAME = r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$"  # what MLflow takes in a name and a file system in a path


class EarlyStop(Frozen):
    """Stop when the validation metric has not improved for `patience` epochs; the best epoch is what is kept."""

    metric: Literal["logloss", "auc"] = Field(default="logloss", description="what decides on the best epoch")
    patience: int = Field(default=2, ge=1, description="epochs without improvement before stopping")


class AverageConfig(Frozen):
    """Averages of the weights over the last steps: they are validated and published, while training goes on without."""

    name: Literal["none", "ema"] = Field(
        default="none",
        description="ema: an exponential moving average is validated and published, not the last weights",
    )
    span: float = Field(
        default=0.5,
        gt=0,
        allow_inf_nan=False,
        description="passes over the data, or days, after which a weight counts 1/e; at most a quarter of the training "
        "so far",
    )
    every: int = Field(
        default=10,
        ge=1,
        description="steps between updates, each of which reads and writes all tables; at most a twentieth of the span",
    )


class TrainConfig(Frozen):
    """The loop."""

    epochs: int = Field(default=10, ge=1, description="most passes over the training split")
    batch_size: int = Field(default=4096, ge=1, description="rows per step over all processes together")
    precision: Precision = Field(
        default="fp32",
        description="of the network's products; weights, sums, statistics of norms and the loss are fp32 in all three. "
        "tf32 is CUDA's, a CPU computes in fp32 instead",
    )
    gradient_clip: float | None = Field(
        default=10.0, gt=0, description="largest norm of all the network's gradients together; null: no limit"
    )
    seed: int = Field(default=1, ge=0, description="decides initial weights, data order and dropout")
    early_stop: EarlyStop = EarlyStop()
    average: AverageConfig = AverageConfig()
    members: int = Field(
        default=1,
        ge=1,
        le=99,
        description="models of the bundle, each with tables of its own, trained one after the other with seeds from "
        "`seed` on; the mean of their scores is served, at so many times the cost",
    )
    checkpoint_steps: int = Field(
        default=1000, ge=1, description="steps between checkpoints, beside one after every epoch"
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="newest checkpoints that are kept, beside the best")
    on_nan: Literal["stop", "skip"] = Field(
        default="stop", description="a loss that is no number or above max_loss: end training, or skip the batch"
    )
    max_loss: float = Field(default=100.0, gt=0, description="a step's mean loss above this counts as exploded")
    pipeline: Literal["sparse_dist", "semi_sync"] = Field(
        default="sparse_dist",
        description="TorchRec's training pipeline; semi_sync, on CUDA, looks embeddings up before the last update",
    )
    managed_steps: int = Field(
        default=100,
        ge=1,
        description="steps after which new ids of managed fields get rows; at most a tenth of the training",
    )
    train_only_affine: bool = Field(
        default=False, description="of a model given by --from, train only the norms' affines and the logit's layer"
    )


class TrackingConfig(Frozen):
    """Where runs and models are recorded."""

    uri: str | None = Field(
        default=None, description="MLflow's address; by default MLFLOW_TRACKING_URI, or else sqlite:///mlflow.db"
    )
    registered_model: str = Field(pattern=NAME, description="name in the model registry")


class Config(Frozen):
    """A whole training configuration."""

    experiment: str = Field(pattern=NAME, description="MLflow experiment, and folder under runs/")
    model: MaskNetConfig = MaskNetConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    sharding: ShardingConfig = ShardingConfig()
    train: TrainConfig = TrainConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    serving: ServingConfig = ServingConfig()
    tracking: TrackingConfig

    @model_validator(mode="after")
    def _skips_only_what_can_be_skipped(self) -> "Config":
        if self.train.pipeline == "semi_sync" and self.train.on_nan == "skip":
            raise ValueError("train.on_nan skip needs train.pipeline sparse_dist: semi_sync has looked ahead already")
        return self

    @model_validator(mode="after")
    def _projects_what_is_scale_invariant(self) -> "Config":
        if self.optimizer.dense.normalize_and_project:
            norm, kind = self.model.hidden_norm.name, self.model.kind
            if kind == "residual_serial" or not self.model.feed_forward or not NORMS[norm].scale_invariant:
                raise ValueError(
                    "optimizer.dense.normalize_and_project needs a hidden norm right after W that no factor changes, "
                    f"in a serial or parallel network; here it is {norm}, kind {kind}"
                )
        return self


def load_config(path: Path, overrides: list[str]) -> Config:
    """Read a configuration and apply `key.path=value` overrides, whose values are YAML.

    Raises:
        InputError: the file, a key or a value is wrong; the message names it.
    """
    data = load_yaml(path, "config")
    override(data, overrides)
    return validate(Config, data, f"config {path}")


def save_config(config: Config, path: Path) -> None:
    """Write every key with its value, defaults included, so that a later default changes no old run; no password."""
    given = config.model_dump(mode="json")
    if config.tracking.uri:
        given["tracking"]["uri"] = without_password(config.tracking.uri)
    path.write_text(yaml.safe_dump(given, sort_keys=False))
