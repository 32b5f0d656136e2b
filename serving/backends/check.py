"""Whether fast backends are good enough for a model, found on labelled rows.

A backend passes if a row's score does not depend on what else is in its batch, and it loses less than 1e-4 of AUC and
of log loss: not on these rows by luck, but on all rows like them. A loss is a mean over rows of small differences,
which has a standard error; that much, 1.64 times (one-sided, 95 %), is allowed for. Where it is too large to tell, the
rows are too few. The errors take rows as independent; differences that come of rounding nearly are, rows of one user
too. Neither loss nor error show what no row has met: if one of 1,000 lands a tenth of all ranks off, that is 1e-4 of
AUC, and it takes 3,000 to see such a one with 95 %.

Legend: N rows, D width of all embeddings.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from features.errors import one_line
from features.metrics import log_losses
from features.metrics_delong import auc_with_error
from masknet.folding import ServingNetwork, fold
from serving.backends.base import Network
from serving.backends.fast import FASTEST_FIRST, at_hand, fast_network, lacking, versions
from serving.backends.ranges import Observer, Ranges
from serving.backends.record import Backends, Device, Fast, Record, Verdict
from serving.calibration import ScoreN
from serving.scorer import Scorer

MOST_LOST = 1e-4  # AUC, and nats
CONFIDENT, LEAST_ROWS = 1.645, 3_000  # standard errors; rows
BATCH_TOLERANCE = 1e-6  # in probability: the last layer's sums are fp32
BATCHES = (500, 50, 1)
RANGE_ROWS = 16_384


def check_backends(
    scorer: Scorer,
    encoded: pa.Table,
    label_N: np.ndarray,
    split: str,
    most_rows: int = 200_000,
    seed: int = 0,
    devices: Sequence[Device] | None = None,
) -> Backends:
    """Try every fast backend on rows drawn at random.

    Args:
        scorer: what exact scores come from.
        encoded: rows in its pipeline's encoding, at least two.
        label_N: theirs, 0 or 1.
        split: what the rows are called.
        most_rows: how many are scored, at most; others, a quarter of all at most, give the bounds of layers in int8.
        seed: of the draw.
        devices: on which; by default those that this machine has.
    """
    row_N = np.random.default_rng(seed).permutation(encoded.num_rows)
    few = max(1, min(RANGE_ROWS, len(row_N) // 4))
    range_rows, rows = np.sort(row_N[:few]), np.sort(row_N[few : few + most_rows])
    networks = [fold(model.network) for model in scorer.models]
    ranges = _ranges(scorer, networks, encoded.take(pa.array(range_rows)))
    trial = _Trial.of(scorer, networks, encoded.take(pa.array(rows)), label_N[rows])
    records: dict[Device, Record] = {}
    for device in devices or at_hand():
        verdicts: dict[Fast, Verdict] = {name: trial.verdict(name, device, ranges) for name in FASTEST_FIRST[device]}
        facts = {"split": split, "rows": len(rows), "range_rows": few, "versions": versions(device)}
        records[device] = Record.model_validate({**facts, "backends": verdicts})
    reads_bytes = "cpu" in records and records["cpu"].reads_bytes
    return Backends(records, tuple(ranges) if reads_bytes else ())


def _ranges(scorer: Scorer, networks: Sequence[ServingNetwork], encoded: pa.Table) -> list[Ranges]:
    observers = [Observer(network) for network in networks]
    scorer.with_networks(observers).uncalibrated(encoded)
    return [observer.ranges() for observer in observers]


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

    def verdict(self, name: Fast, device: Device, ranges: Sequence[Ranges]) -> Verdict:
        """What a backend makes of the rows; one that cannot take the network has not passed."""
        if (lacks := lacking(name, device)) is not None:
            return Verdict(passed=False, reason=lacks)
        try:
            networks = [fast_network(name, *each, device) for each in zip(self.networks, ranges, strict=True)]
            return self._measured(networks)
        except (RuntimeError, NotImplementedError, ValueError) as error:  # oneDNN's are RuntimeErrors
            return Verdict(passed=False, reason=f"it does not take this network: {one_line(error)}")

    @torch.inference_mode()
    def _measured(self, networks: Sequence[Network]) -> Verdict:
        ranking_N, served_N = self.scorer.with_networks(networks).ranked_and_served(self.encoded)
        auc = auc_with_error(self.label_N, self.ranking_N, ranking_N)
        more_N = log_losses(self.label_N == 1, served_N) - log_losses(self.label_N == 1, self.served_N)
        more = float(more_N.mean())
        more_error = float(more_N.std(ddof=1)) / math.sqrt(len(more_N)) if len(more_N) > 1 else None
        apart = max(_batch_difference(*each) for each in zip(networks, self.batch, strict=True))
        losses = ("AUC", *auc), ("log loss", more, more_error)
        reasons = [_moves(apart), _few(len(more_N)), *(_loses(*each, len(more_N)) for each in losses)]
        reason = next(filter(None, reasons), None)
        return Verdict(
            passed=reason is None,
            reason=reason,
            auc_loss=auc[0],
            auc_error=auc[1],
            logloss_increase=more,
            logloss_error=more_error,
            largest_difference=float(np.abs(served_N - self.served_N).max()),
            batch_difference=apart,
        )


def _moves(difference: float) -> str | None:
    if difference <= BATCH_TOLERANCE:
        return None
    return f"a row's score moves by {difference:.1e} with its batch, and may by {BATCH_TOLERANCE:.0e}"


def _few(rows: int) -> str | None:
    return f"too few rows to tell: {rows:,}, and it takes {LEAST_ROWS:,} at least" if rows < LEAST_ROWS else None


def _loses(what: str, lost: float | None, error: float | None, rows: int) -> str | None:
    """Why a loss is not allowed; None where it is surely less than may be."""
    if lost is None:
        return f"{what} is not defined: the rows are of one class"
    if error is None:
        return f"too few rows to tell: {rows}, with less than five of a class"
    if lost + CONFIDENT * error < MOST_LOST:
        return None
    if lost - CONFIDENT * error >= MOST_LOST:
        return f"it loses {lost:.1e} of {what}; less than {MOST_LOST:.0e} is allowed"
    told = (
        f"too few rows to tell: on {rows:,} it loses {lost:.1e} ± {error:.1e} of {what}; {MOST_LOST:.0e} is the limit"
    )
    if lost == MOST_LOST:
        return told
    return f"{told}, which some {math.ceil(rows * (CONFIDENT * error / (MOST_LOST - lost)) ** 2):,} rows would tell"


def _batch_difference(network: Network, emb_ND: torch.Tensor) -> float:
    """The most that a probability moves between batches of several sizes."""
    nothing = torch.empty(1, 0)
    found = [torch.cat([network(nothing, part) for part in torch.split(emb_ND, size)]).sigmoid() for size in BATCHES]
    return max(float((each - found[0]).abs().max()) for each in found[1:])
