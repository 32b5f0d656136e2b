"""The ranking engine: scores and rankings from a bundle, without any notion of HTTP.

A request's context is encoded, looked up and taken through its share of the network once, its candidates after that.
`serving.scorer` is the reference: with backend `exact` and tables in fp32 the scores are its scores to 1e-6.

Legend: N candidates or rows, K best of them.
"""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from features.columns import Rows
from features.schema import Schema
from masknet.folding import ServingNetwork
from serving.backends.base import Backend, Kind
from serving.backends.choose import chosen, kind_of, make_backend
from serving.bundle import Bundle, load_bundle
from serving.calibration import ScoreN
from serving.ranking.asked import Asked, Encoding, parts_of
from serving.ranking.counts import note_counts
from serving.ranking.member import Member
from serving.ranking.tables import Precision
from serving.ranking.transfer import OneTrip
from serving.ranking.warming import warm_up
from serving.trace import Trace

CHUNK = 2048  # rows at once: bounds memory, and what a layer leaves fits the cache; of no consequence but for rounding


@dataclass(frozen=True)
class Ranked:
    """A candidate's place in the request, and its score, calibrated."""

    index: int
    score: float


class RankingEngine:
    """A loaded, verified model that ranks candidates and scores rows; for one call at a time or several.

    Args:
        bundle: an opened bundle. With tables in fp32 they are moved, and the bundle's scorer reads them there.
        version: what the registry calls it.
        backend: `exact`, or the fastest that the bundle's own check has passed.
        tables: precision of the embedding tables in memory.
        device: where the network runs; lookups run on the CPU.
        threads: of products; None leaves torch's setting.

    Raises:
        InputError: the bundle has passed no check of a fast backend.
    """

    def __init__(
        self,
        bundle: Bundle,
        version: str,
        *,
        backend: Kind = "exact",
        tables: Precision = "fp32",
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        self.bundle, self.version, self.threads, self.device = bundle, version, threads, device
        self._lock = threading.Lock()  # a backend takes one call at a time; encoding goes on meanwhile
        self._shift = math.log(bundle.scorer.sampling_rate)
        self._verdict = chosen(kind_of(device), bundle.backends)[1] if backend == "fast" else None
        self._use_threads()
        self.encoding = Encoding(bundle.schema, bundle.pipeline, bundle.scorer.id_maps)
        self.members = [
            Member(bundle.pipeline, model, self.encoding.context, tables, partial(self._backend, backend, place))
            for place, model in enumerate(bundle.scorer.models)
        ]
        self._trips: tuple[OneTrip, OneTrip] | None = None  # of whole rows, and with the context apart
        if device != "cpu":
            whole, split = [member.whole for member in self.members], [member.split for member in self.members]
            self._trips = OneTrip(whole, device), OneTrip(split, device)

    @classmethod
    def load(
        cls,
        path: Path,
        version: str | None,
        *,
        backend: Kind = "exact",
        tables: Precision = "fp32",
        device: str = "cpu",
        threads: int | None = None,
    ) -> "RankingEngine":
        """Open a bundle, and answer its golden rows as requests are answered before anybody else's.

        With tables in fp16 or int8 those in fp32 are let go: the bundle's own scorer has none afterwards. Outside a
        registry `version` is None, and part of the digest counts.

        Raises:
            InputError: as `load_bundle` and the constructor do, or a golden row gets another score.
        """
        bundle = load_bundle(path)
        engine = cls(bundle, bundle.version(version), backend=backend, tables=tables, device=device, threads=threads)
        warm_up(engine)
        if tables != "fp32":
            for model in bundle.scorer.models:
                model.embeddings.to("meta")
        return engine

    @property
    def name(self) -> str:
        """The registered model's name."""
        return self.bundle.name

    @property
    def schema(self) -> Schema:
        return self.bundle.schema

    def about(self) -> dict[str, Any]:
        """How it scores, for GET /model: with `bound`, and what the check of a fast backend has found."""
        tables = [member.tables for member in self.members]
        return {
            "backend": self.members[0].split.name,
            "largest_difference": self.bound,
            "check": self._verdict and self._verdict.model_dump(),
            "device": self.device,
            "threads": self.threads or torch.get_num_threads(),
            "context": list(self.encoding.context),
            "tables": {
                "precision": tables[0].precision,
                "bytes": sum(each.nbytes for each in tables),
                "largest_error": max(each.largest_error for each in tables),
            },
        }

    @property
    def bound(self) -> float | None:
        """The largest difference in probability from the reference scorer that the backend's check has seen, 0 for
        `exact`; None with rounded tables, which it has not looked at."""
        if self.members[0].tables.precision != "fp32":
            return None
        return max(backend.bound for member in self.members for backend in (member.whole, member.split))

    def predict(self, rows: Rows, trace: Trace | None = None) -> ScoreN:
        """Scores [N] of rows that have every field that is sent, and the columns that date fields read.

        Raises:
            InputError: a field's column is missing, or a value cannot be what the field says; names field and row.
                Unscorable where a number is too large; names the row.
        """
        asked = [self.encoding.rows(part) for part in parts_of(rows)]
        given = [part for part in asked if part is not None]
        if len(given) < len(asked):  # the pipeline knows what to do, or says what is wrong, and where in all the rows
            given = [self.encoding.by_pipeline(rows)]
        if trace:
            trace.lap("encode")
        return self._served(np.concatenate([self._scores(part, trace) for part in given]), trace)

    def rank(
        self,
        context: Mapping[str, Any],
        candidates: Rows,
        top_k: int,
        time: datetime | None = None,
        trace: Trace | None = None,
    ) -> list[Ranked]:
        """The best `top_k` candidates by their uncalibrated scores, best first, equal ones in the order of the request.

        Args:
            context: one value per field that all candidates share.
            candidates: the other fields, a column or a row each.
            top_k: how many to return, at least 1.
            time: when the candidates are shown, which date fields read; by default now. Without a zone it is UTC. It
                does not replace a column of times that is given.
            trace: gets the stages' times, the scores of all candidates, and what the fields were like.

        Raises:
            InputError: a field is given twice or not at all, or a value cannot be what its field says; Unscorable
                where a number is too large.
        """
        time = time or datetime.now(UTC)
        asked = self.encoding.request(context, candidates, time)
        if trace:
            trace.time = time
            trace.lap("encode")
        order_by_N = self._scores(asked, trace)
        best = np.argsort(-order_by_N, kind="stable")[:top_k]
        score_K = self._served(order_by_N, trace)[best]  # of all, since a candidate without a score is nobody's last
        return [Ranked(index, score) for index, score in zip(best.tolist(), score_K.tolist(), strict=True)]

    def uncalibrated(self, encoded: pa.Table) -> ScoreN:
        """Scores [N] before the calibration of rows that the bundle's pipeline has encoded: what rankings order by."""
        return self._scores(self.encoding.encoded(encoded))

    def _backend(self, kind: Kind, member: int, network: ServingNetwork) -> Backend:
        return make_backend(network, kind, self.device, self.threads, self.bundle.backends, member=member)

    def _served(self, score_N: ScoreN, trace: Trace | None = None) -> ScoreN:
        served_N = self.bundle.scorer.calibration.apply(score_N)
        if trace:
            trace.score_N = served_N
        return served_N

    def _scores(self, asked: Asked, trace: Trace | None = None) -> ScoreN:
        """Uncalibrated scores [N]: the mean over members of σ(logit − log(1 / rate))."""
        if trace:
            note_counts(trace, asked, self.encoding.fixed)
        with self._lock, torch.inference_mode():
            self._use_threads()
            score_MN = self._here(asked, trace) if self._trips is None else self._there(self._trips, asked, trace)
            found_N: ScoreN = score_MN.mean(0).numpy()
        return found_N

    def _here(self, asked: Asked, trace: Trace | None) -> torch.Tensor:
        """Scores [M, N] of each member, a part of the rows at a time."""
        score_MN = torch.empty(len(self.members), asked.rows)
        for member, score_N in zip(self.members, score_MN, strict=True):
            context_1C = member.context(asked.encoded) if asked.split else None
            for start in range(0, asked.rows, CHUNK):
                rows = min(CHUNK, asked.rows - start)
                part = asked.encoded if asked.rows <= CHUNK else asked.encoded.some(start, start + rows)
                emb_BR = member.rows(part, rows) if context_1C is None else member.candidates(part, rows)
                if trace:
                    trace.lap("lookup")
                logit_B = member.logits(context_1C, emb_BR)
                torch.sigmoid(logit_B + self._shift, out=score_N[start : start + rows])
                if trace:
                    trace.lap("model")
        return score_MN

    def _there(self, trips: tuple[OneTrip, OneTrip], asked: Asked, trace: Trace | None) -> torch.Tensor:
        """Scores [M, N] from a device: one copy of all members' embeddings to it, and one of all logits back."""
        nothing, rows = torch.empty(1, 0), asked.rows
        parts_M = [
            (member.context(asked.encoded), member.candidates(asked.encoded, rows))
            if asked.split
            else (nothing, member.rows(asked.encoded, rows))
            for member in self.members
        ]
        if trace:
            trace.lap("lookup")
        score_MN = torch.sigmoid(trips[asked.split].logits(parts_M) + self._shift)
        if trace:
            trace.lap("model")
        return score_MN

    def _use_threads(self) -> None:
        """In the thread that computes: OpenMP counts threads for each calling thread."""
        if self.threads is not None and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
