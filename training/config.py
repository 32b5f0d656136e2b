"""The training configuration: one YAML file, every key described here. `--set section.key=value` overrides."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from features.errors import InputError
from features.validation import Frozen, load_yaml, validate
from masknet.config import MaskNetConfig
from masknet.norms import NORMS

NAME = r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$"  # what MLflow takes in a name and a file system in a path


class DenseOptimizer(Frozen):
    """Optimizer of the network's weights."""

    name: Literal["adam", "scale"] = Field(
        default="adam", description="Adam (arXiv 1412.6980), or SCALE (arXiv 2506.16659), which keeps next to no state"
    )
    lr: float = Field(default=1.0e-3, gt=0, description="learning rate")
    weight_decay: float = Field(
        default=0.0, ge=0, description="adam: L2 penalty added to the gradient; scale: decoupled"
    )
    normalize_and_project: bool = Field(
        default=False, description="keep the size of weights that a norm makes scale-invariant (arXiv 2407.01800)"
    )


class SparseOptimizer(Frozen):
    """Optimizer of the embedding tables, fused into the backward pass; these three are what FBGEMM's CPU build has."""

    name: Literal["sgd", "adagrad", "rowwise_adagrad"] = Field(
        default="rowwise_adagrad", description="row-wise Adagrad keeps one statistic per row instead of one per weight"
    )
    lr: float = Field(default=0.02, gt=0, description="learning rate")


class OptimizerConfig(Frozen):
    """Two optimizers: one for the network, one for the tables."""

    dense: DenseOptimizer = DenseOptimizer()
    sparse: SparseOptimizer = SparseOptimizer()


class EarlyStop(Frozen):
    """Stop when the validation metric has not improved for `patience` epochs; the best epoch is what is kept."""

    metric: Literal["logloss", "auc"] = Field(default="logloss", description="what decides on the best epoch")
    patience: int = Field(default=2, ge=1, description="epochs without improvement before stopping")


class TrainConfig(Frozen):
    """The loop."""

    epochs: int = Field(default=10, ge=1, description="most passes over the training split")
    batch_size: int = Field(default=4096, ge=1, description="rows per step over all processes together")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16 runs the network under autocast")
    seed: int = Field(default=1, ge=0, description="decides initial weights, data order and dropout")
    early_stop: EarlyStop = EarlyStop()
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
    train: TrainConfig = TrainConfig()
    tracking: TrackingConfig

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
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(f"--set {override!r} is not of the form section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"--set {override!r}: the value is not YAML") from None
        set_key(data, key, value, f"--set {override!r}")
    return validate(Config, data, f"config {path}")


def set_key(data: dict[str, Any], path: str, value: Any, source: str) -> None:
    """Set a key like model.blocks in nested sections, made where they are missing; errors begin with `source`."""
    *sections, key = path.split(".")
    for name in sections:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise InputError(f"{source}: {name} is a value, not a section")
    data[key] = value


def save_config(config: Config, path: Path) -> None:
    """Write every key with its value, defaults included, so that a later default changes no old run."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
