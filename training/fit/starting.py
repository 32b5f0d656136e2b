"""What training starts from: a fresh model or a given one, checked against configuration and data first."""

from dataclasses import dataclass, field
from functools import cached_property

import pyarrow as pa
import torch
from torch import nn

from features.dataset import LABEL, PreparedDataset
from features.errors import InputError
from features.id_maps import IdMap
from masknet.config import MaskNetConfig
from masknet.model import MaskNet
from masknet.norms.base import Norm
from masknet.removal import begin_removal, finish_removal
from serving.bundle import Bundle, fields_of, tables_of
from serving.members import Member
from training.config import Config
from training.errors import Failure

_FREE = ("dropout", "embedding_dropout", "embedding_init")  # keys of `model` that are none of a trained model's shape


@dataclass
class Weights:
    """A trained model's weights, whole and on the CPU: all but the tables, the tables by name, managed ids' rows."""

    network: dict[str, torch.Tensor]
    tables: dict[str, torch.Tensor]
    id_maps: dict[str, IdMap] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """The model that training goes on from."""

    bundle: Bundle
    remove_norms: bool = False

    @cached_property
    def weights(self) -> Weights:
        """Its weights, the tables by name."""
        [model] = self.bundle.scorer.models
        member = Member.of(model)
        return Weights(member.network, member.tables, self.bundle.scorer.id_maps)


def require_trainable(config: Config, dataset: PreparedDataset, valid: pa.Table | None) -> None:
    """InputError for what would otherwise be noticed in the middle, or at the end, of training."""
    label_N = valid[LABEL].to_numpy() if valid is not None else None
    if config.train.early_stop.metric == "auc" and label_N is not None and label_N.min() == label_N.max():
        raise InputError("train.early_stop.metric auc needs both classes in the validation split, which has one only")
    try:
        with torch.device("meta"):
            build_model(config.model, dataset, "meta")
    except ValueError as error:
        raise InputError(f"config: model: {error}") from None


def require_start_fits(config: Config, dataset: PreparedDataset, start: Start | None) -> None:
    """InputError where a configuration, a data set and the model to start from do not go together."""
    if start is None:
        if config.train.train_only_affine:
            raise InputError("train.train_only_affine trains next to nothing of a fresh model: give one with --from")
        return
    if config.optimizer.embedding_prior:
        raise InputError(
            "optimizer.embedding_prior pulls embeddings to 0 and counts these rows alone, which undoes what the model "
            "of --from knows: set it to 0, and optimizer.sparse.lr to about 0.003"
        )
    if start.remove_norms and config.optimizer.dense.normalize_and_project:
        raise InputError(
            "--remove-norms ends the scale invariance that optimizer.dense.normalize_and_project relies on"
        )
    name = f"model {start.bundle.name}"
    if (members := len(start.bundle.scorer.models)) > 1:
        raise InputError(f"{name} is an ensemble of {members}: training goes on from one model")
    if dataset.pipeline.digest != start.bundle.pipeline.digest:
        raise InputError(
            f"prepared data {dataset.path} was encoded by another pipeline than that of {name}, where training starts: "
            "prepare the raw rows with --pipeline MODEL"
        )
    rate, their_rate = dataset.schema.sampling_rate, start.bundle.manifest["sampling_rate"]
    if rate != their_rate:
        raise InputError(
            f"prepared data {dataset.path} keeps another share of negatives ({rate}) than that of {name} "
            f"({their_rate}), where training starts: its scores are corrected by that"
        )
    theirs = start.bundle.config.model_dump()
    other = [key for key, value in config.model.model_dump().items() if key not in _FREE and theirs[key] != value]
    if other:
        raise InputError(f"config: model.{other[0]} is not that of {name} ({theirs[other[0]]}), where training starts")


def build_model(config: MaskNetConfig, dataset: PreparedDataset, device: str = "cpu") -> MaskNet:
    """A model for a data set's fields."""
    return MaskNet(config, tables_of(dataset.pipeline), fields_of(dataset.pipeline), device=device)


def prepare_model(config: Config, dataset: PreparedDataset, start: Start | None) -> MaskNet:
    """The model that is trained, its tables on the meta device, with what the start asks for.

    Raises:
        InputError: the model to start from cannot be trained so.
    """
    torch.manual_seed(config.train.seed)
    model = build_model(config.model, dataset, "meta")
    if start is not None:
        model.load_dense(start.weights.network)
        if start.remove_norms:
            _begin_removal(model, config.model)
    if config.train.train_only_affine:
        _freeze_all_but_affine(model)
    return model


def without_norms(config: MaskNetConfig, dataset: PreparedDataset, weights: Weights) -> tuple[MaskNetConfig, Weights]:
    """The shape and weights of a network whose norms were frozen in training, once they are folded away."""
    model = build_model(config, dataset, "meta")
    begin_removal(model.network, config)
    model.load_dense(weights.network)
    try:
        folded = finish_removal(model.network, config)
    except ValueError as error:
        raise Failure(f"the norms could not be removed: {error}") from None
    return folded, Weights(model.dense_state(), weights.tables, weights.id_maps)


def _begin_removal(model: MaskNet, config: MaskNetConfig) -> None:
    if {config.embedding_norm.name, config.hidden_norm.name} <= {"none", "affine"}:
        raise InputError("--remove-norms: this model has no norms to remove")
    try:
        begin_removal(model.network, config)
    except ValueError as error:
        raise InputError(f"--remove-norms: {error}") from None


def _freeze_all_but_affine(model: MaskNet) -> None:
    """Let only the norms' parameters and the logit's layer be trained (Frankle et al., arXiv 2003.00152)."""
    trained: list[nn.Module] = [module for module in model.network.modules() if isinstance(module, Norm)]
    if not any(True for module in trained for _ in module.parameters()):
        raise InputError("train.train_only_affine: this model's norms have no parameters to train")
    kept = {id(parameter) for module in [*trained, model.network.logit] for parameter in module.parameters()}
    for parameter in [*model.network.parameters(), *(model.values.parameters() if model.values is not None else [])]:
        parameter.requires_grad_(id(parameter) in kept)
