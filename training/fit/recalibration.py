"""Running statistics as evaluation needs them: of a network without dropout, and of the weights that are evaluated.

Behind a dropout of p the mean square that a running norm sees in training is 1 / (1 − p) times what it is in
evaluation, where nothing is dropped and nothing scaled; and averages of weights have statistics of their own. These
are therefore taken anew before every validation, from training rows and with dropout off; training then goes on with
its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from features.loader import BatchLoader
from masknet.networks import ParallelMaskNet
from masknet.norms.running import RunningNorm
from training.distributed import World
from training.embeddings.managed import ManagedIds

BATCHES = 20  # the first ten are averaged evenly, later ones count a tenth


@contextmanager
def recalibrated(
    dmp: DistributedModelParallel,
    network: nn.Module,
    loader: BatchLoader,
    world: World,
    managed: ManagedIds,
    *,
    averaged: bool = False,
) -> Iterator[None]:
    """For the length of a block, running norms hold statistics of `loader`'s rows without dropout.

    Does nothing where no running norm stands behind a dropout, unless the weights are `averaged`. Every rank must call
    this.
    """
    norms = [module for module in network.modules() if isinstance(module, RunningNorm)]
    if not norms or not (averaged or _reads_dropout(dmp, network)):
        yield
        return
    kept = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    dmp.eval()
    for norm in norms:
        norm.train()
        norm.steps.zero_()
    with torch.no_grad():
        for batch in islice(loader.epoch(0), BATCHES):
            dmp(managed.remap(batch).to(world.device))
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])


def _reads_dropout(dmp: DistributedModelParallel, network: nn.Module) -> bool:
    """Whether norms stand behind a dropout: all do behind that of embeddings, and parallel blocks behind no other."""
    kinds = (nn.Dropout1d,) if isinstance(network, ParallelMaskNet) else (nn.Dropout1d, nn.Dropout, nn.AlphaDropout)
    return any(isinstance(module, kinds) and module.p > 0 for module in dmp.modules())
