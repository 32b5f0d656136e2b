"""Validation in the middle of training, by all ranks together; what is published is measured by the scorer instead."""

import math

import numpy as np
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from features.loader import BatchLoader
from features.metrics import auc, logloss
from training.distributed import World, concat_over_ranks
from training.embeddings.managed import ManagedIds
from training.fit.task import StepOutput


def validate(
    dmp: DistributedModelParallel, loader: BatchLoader, managed: ManagedIds, world: World, rate: float
) -> dict[str, float]:
    """Log loss and AUC of a whole split, with scores σ(logit − log(1 / rate)); the same on every rank.

    NaN where scores are no numbers.
    """
    dmp.eval()
    outputs: list[StepOutput] = []
    with torch.no_grad():
        for batch in loader.epoch(0):
            outputs.append(dmp(managed.remap(batch).to(world.device))[1])
    logit_N = concat_over_ranks(torch.cat([output.logit_B for output in outputs])) + math.log(rate)
    score_N = logit_N.sigmoid().cpu().numpy()
    label_N = concat_over_ranks(torch.cat([output.label_B for output in outputs])).cpu().numpy()
    if not np.isfinite(score_N).all():
        return {"logloss": float("nan"), "auc": float("nan")}
    value = auc(label_N, score_N)
    return {"logloss": logloss(label_N, score_N), "auc": float("nan") if value is None else value}
