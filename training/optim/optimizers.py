"""The optimizers of a sharded model, as one.

dense      the network's and the value embeddings' weights, with a limit on their gradients' common norm
tables     tables that every rank holds whole (data_parallel): ordinary parameters, trained by the sparse method
(no name)  all other tables: fused into the backward pass, where FBGEMM updates the rows that a batch touched
"""

from collections.abc import Mapping

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from training.config import Config
from training.embeddings.sharding import FUSED_EPS, table_of
from training.optim.projection import Projection
from training.optim.scale import Scale
from training.sections import DenseOptimizer, SparseOptimizer

DENSE, TABLES, FUSED = "dense", "tables", ""


def build_optimizer(dmp: DistributedModelParallel, config: Config, network: nn.Module) -> CombinedOptimizer:
    """All of a sharded model's optimizers as one, whose state `torch.distributed.checkpoint` saves and loads.

    Args:
        dmp: a sharded `ClickTask`.
        config: the whole configuration; with train.train_only_affine the tables keep a rate of 0.
        network: the network within, for optimizers that treat its layers differently.
    """
    trained = {name: p for name, p in in_backward_optimizer_filter(dmp.named_parameters()) if p.requires_grad}
    tables = {name: p for name, p in trained.items() if table_of(name)}
    network_and_values = {name: p for name, p in trained.items() if name not in tables}
    parts = [(DENSE, _dense_part(network_and_values, config, network))]
    if tables:
        parts.append((TABLES, _tables_part(tables, config.optimizer.sparse, config.train.train_only_affine)))
    return CombinedOptimizer([*parts, (FUSED, dmp.fused_optimizer)])


def prepare_for_load(optimizer: CombinedOptimizer) -> None:
    """Give the dense part the state that its first step would make: what is not there is silently not restored.

    The other parts have theirs from the start. Weights stay as they are, and gradients are none afterwards.
    """
    for name, part in optimizer.optimizers:
        if name == DENSE:
            parameters = list(part.params.values())
            before = [parameter.detach().clone() for parameter in parameters]
            part.init_state()  # a step with gradients of 0, which decay and momentum do not leave without effect
            with torch.no_grad():
                for parameter, weight in zip(parameters, before, strict=True):
                    parameter.copy_(weight)
            part.zero_grad(set_to_none=True)


def _dense_part(parameters: Mapping[str, nn.Parameter], config: Config, network: nn.Module) -> KeyedOptimizer:
    own, limit = config.optimizer.dense, config.train.gradient_clip
    part: KeyedOptimizer = KeyedOptimizerWrapper(parameters, lambda params: _dense(list(params), own, network))
    if limit is None:
        return part
    # DDP has made the gradients equal on all ranks, so that each rank's norm is the common one.
    return GradientClippingOptimizer(part, GradientClipping.NORM, limit)


def _dense(params: list[nn.Parameter], config: DenseOptimizer, network: nn.Module) -> torch.optim.Optimizer:
    lr, decay = config.lr, config.weight_decay
    optimizer: torch.optim.Optimizer
    # fused: one pass over the weights, on a CPU six times as fast as the default
    match config.name:
        case "adam":
            optimizer = torch.optim.Adam(params, lr=lr, weight_decay=decay, fused=True)
        case "adamw":
            optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=decay, fused=True)
        case "sgd":
            optimizer = torch.optim.SGD(params, lr=lr, weight_decay=decay, momentum=config.momentum, fused=True)
        case "adagrad":
            optimizer = torch.optim.Adagrad(params, lr=lr, weight_decay=decay)
        case "scale":
            optimizer = Scale(network, params, lr=lr, weight_decay=decay)
    if config.normalize_and_project:
        project = Projection(network)
        optimizer.register_step_post_hook(lambda *_: project())
    return optimizer


def _tables_part(tables: Mapping[str, nn.Parameter], config: SparseOptimizer, frozen: bool) -> KeyedOptimizer:
    return KeyedOptimizerWrapper(tables, lambda params: _sparse(list(params), config, 0.0 if frozen else config.lr))


def _sparse(params: list[nn.Parameter], config: SparseOptimizer, lr: float) -> torch.optim.Optimizer:
    """FBGEMM's method of the same name; its sums of squares start at 0 too."""
    decay = config.weight_decay
    if config.name == "sgd":
        return torch.optim.SGD(params, lr=lr, weight_decay=decay)
    if config.name == "adagrad":
        return torch.optim.Adagrad(params, lr=lr, weight_decay=decay, eps=FUSED_EPS)
    return RowWiseAdagrad(params, lr=lr, weight_decay=decay, eps=FUSED_EPS)  # `placements` lets no other through
