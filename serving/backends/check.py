"""Whether fast backends are good enough for a model, found on labelled rows.

A backend passes if a row's score does not depend on what else is in its batch, and it loses less than 1e-4 of AUC and
of log loss.

Legend: N rows, D width of all embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import pyarrow as pa
import torch

from features.errors import one_line
from features.metrics import auc, logloss
from masknet.folding import ServingNetwork, fold
from serving.backends.base import Network
from serving.backends.fast import FASTEST_FIRST, fast_network, lacking
from serving.backends.ranges import Observer, Ranges
from serving.backends.record import Backends, Fast, Record, Verdict
from serving.calibration import ScoreN
from serving.scorer import Scorer

MOST_LOST = 1e-4  # AUC, and nats
BATCH_TOLERANCE = 1e-6  # in probability: the last layer's sums are fp32
BATCHES = (500, 50, 1)
RANGE_ROWS = 16_384


def check_backends(
    scorer: Scorer, encoded: pa.Table, label_N: np.ndarray, split: str, most_rows: int = 200_000, seed: int = 0
) -> Backends:
    """Try every fast backend on rows drawn at random.

    Args:
        scorer: what exact scores come from.
        encoded: rows in its pipeline's encoding, at least two.
        label_N: theirs, 0 or 1.
        split: what the rows are called.
        most_rows: how many are scored, at most; others, half of all at most, give the bounds of int8's layers.
        seed: of the draw.
    """
    row_N = np.random.default_rng(seed).permutation(encoded.num_rows)
    few = max(1, min(RANGE_ROWS, len(row_N) // 2))
    range_rows, rows = np.sort(row_N[:few]), np.sort(row_N[few : few + most_rows])
    networks = [fold(model.network) for model in scorer.models]
    ranges = _ranges(scorer, networks, encoded.take(pa.array(range_rows)))
    trial = _Trial.of(scorer, networks, encoded.take(pa.array(rows)), label_N[rows])
    verdicts: dict[Fast, Verdict] = {name: trial.verdict(name, ranges) for name in FASTEST_FIRST}
    versions = {"torch": version("torch"), "cpu": torch.backends.cpu.get_cpu_capability()}
    record = Record(split=split, rows=len(rows), range_rows=few, versions=versions, backends=verdicts)
    return Backends(record, tuple(ranges) if verdicts["int8"].passed else ())


def _ranges(scorer: Scorer, networks: Sequence[ServingNetwork], encoded: pa.Table) -> list[Ranges]:
    observers = [Observer(network) for network in networks]
    scorer.with_networks(observers).uncalibrated(encoded)
    return [observer.ranges for observer in observers]


class _Kept:
    """A network that keeps what it is given."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.emb_ND = torch.empty(0, 0)

    def __call__(self, context_10: torch.Tensor, emb_ND: torch.Tensor) -> torch.Tensor:
        self.emb_ND = emb_ND
        return self.network(context_10, emb_ND)


@dataclass(frozen=True)
class _Trial:
    """Rows with their exact scores.

    `networks` are the members', folded, and `batch` their embeddings of the first rows.
    """

    scorer: Scorer
    networks: Sequence[ServingNetwork]
    encoded: pa.Table
    label_N: np.ndarray
    ranking_N: ScoreN
    served_N: ScoreN
    batch: Sequence[torch.Tensor]

    @classmethod
    def of(cls, scorer: Scorer, networks: Sequence[ServingNetwork], encoded: pa.Table, label_N: np.ndarray) -> "_Trial":
        kept = [_Kept(network) for network in networks]
        scorer.with_networks(kept).uncalibrated(encoded.slice(0, max(BATCHES)))
        scores = scorer.ranked_and_served(encoded)
        return cls(scorer, networks, encoded, label_N, *scores, [each.emb_ND for each in kept])

    def verdict(self, name: Fast, ranges: Sequence[Ranges]) -> Verdict:
        """What a backend makes of the rows; one that cannot take the network has not passed."""
        if (lacks := lacking(name)) is not None:
            return Verdict(passed=False, reason=lacks)
        try:
            networks = [fast_network(name, *each) for each in zip(self.networks, ranges, strict=True)]
            return self._measured(networks)
        except (RuntimeError, NotImplementedError, ValueError) as error:  # oneDNN's are RuntimeErrors
            return Verdict(passed=False, reason=f"it does not take this network: {one_line(error)}")

    @torch.inference_mode()
    def _measured(self, networks: Sequence[Network]) -> Verdict:
        ranking_N, served_N = self.scorer.with_networks(networks).ranked_and_served(self.encoded)
        exact, found = auc(self.label_N, self.ranking_N), auc(self.label_N, ranking_N)
        lost = None if exact is None or found is None else exact - found
        more = logloss(self.label_N, served_N) - logloss(self.label_N, self.served_N)
        apart = max(_batch_difference(*each) for each in zip(networks, self.batch, strict=True))
        reason = _reason(lost, more, apart)
        return Verdict(
            passed=reason is None,
            reason=reason,
            auc_loss=lost,
            logloss_increase=more,
            largest_difference=float(np.abs(served_N - self.served_N).max()),
            batch_difference=apart,
        )


def _reason(auc_loss: float | None, logloss_increase: float, batch_difference: float) -> str | None:
    if not batch_difference <= BATCH_TOLERANCE:
        return f"a row's score moves by {batch_difference:.1e} with its batch, and may by {BATCH_TOLERANCE:.0e}"
    if auc_loss is None:
        return "AUC is not defined: the rows are of one class"
    for name, found in (("AUC", auc_loss), ("log loss", logloss_increase)):
        if not found < MOST_LOST:
            return f"it loses {found:.1e} of {name}; less than {MOST_LOST:.0e} is allowed"
    return None


def _batch_difference(network: Network, emb_ND: torch.Tensor) -> float:
    """The most that a probability moves between batches of several sizes."""
    nothing = torch.empty(1, 0)
    found = [torch.cat([network(nothing, part) for part in torch.split(emb_ND, size)]).sigmoid() for size in BATCHES]
    return max(float((each - found[0]).abs().max()) for each in found[1:])
