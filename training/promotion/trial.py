"""Challenger and champion on the same labelled rows: scores, metrics, and the checks made of them.

Legend: N rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.dataset import LABEL, PreparedDataset, SplitFiles, groups_of
from features.errors import InputError
from serving.bundle import Bundle
from training.errors import Failure
from training.evaluation.comparison import assess
from training.evaluation.results import Comparison, Estimate
from training.evaluation.rows import rows_of_files, same_rows_of_files
from training.promotion.checks import Check, check_calibration, check_differences, check_rows, check_slice
from training.promotion.config import PromotionConfig
from training.promotion.parts import rows_of_rule

ScoreN = npt.NDArray[np.floating]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Contender:
    """A model of the trial: what its users call it, and its opened bundle."""

    uri: str
    bundle: Bundle


@dataclass(frozen=True)
class Given:
    """The labelled rows that a trial is about: prepared ones, or raw files."""

    data: Path | None = None
    sources: tuple[str, ...] = ()
    split: str = "test"
    max_bad_rows: float = 0.01


@dataclass(frozen=True)
class _Encoded:
    """The rows of a trial: in each contender's encoding, and the training split where it is at hand.

    `lost` says why negatives are missing from the rows; scores are for all that there were.
    """

    tables: list[pa.Table]
    source: str
    train: SplitFiles | None
    lost: str | None


@dataclass(frozen=True)
class Evidence:
    """What a trial has found: metrics by contender, the challenger first, and how it compares with a champion."""

    source: str
    rows: int
    clicks: int
    metrics: dict[str, dict[str, Estimate]]
    comparison: Comparison | None
    checks: tuple[Check, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON, without the checks."""
        return {key: value for key, value in asdict(self).items() if key != "checks"}


def try_out(
    challenger: Contender,
    champion: Contender | None,
    given: Given,
    config: PromotionConfig,
    progress: Progress | None = None,
) -> Evidence:
    """Score the rows with both models and make every check.

    Args:
        challenger: what wants the alias.
        champion: what holds it; without one only the checks of the challenger alone are made.
        given: the rows.
        config: the checks' thresholds, and the slices.
        progress: called with how many of how many of the bootstrap's draws are done.

    Raises:
        InputError: the rows are not what both models can be judged by, or a slice is not in the challenger's data.
        Failure: a model gives a row no number as its score.
    """
    contenders = [challenger] if champion is None else [challenger, champion]
    rows = _of_dataset(contenders, given.data, given.split) if given.data else _of_files(contenders, given)
    table = rows.tables[0]
    if table.num_rows == 0:
        raise InputError(f"{rows.source} has no rows to judge a model by")
    label_N, group_N = table[LABEL].to_numpy(), groups_of(table)
    # before all that takes long: a wrong rule is told at once
    slices = [(rule, rows_of_rule(rule, challenger.bundle, table, rows.train)) for rule in config.slices]
    scores, rankings = _scored(contenders, rows.tables)
    assessed = assess(label_N, scores, group_N, rankings=rankings, replicates=config.replicates, progress=progress)
    own_N = scores[challenger.uri]
    checks = [check_rows(len(label_N), config), *check_calibration(label_N, own_N, group_N, config, rows.lost)]
    comparison = None
    if champion is not None:
        comparison, other_N = assessed.comparisons[champion.uri], scores[champion.uri]
        checks += check_differences(comparison, config)
        checks += [check_slice(rule, label_N[row_n], own_N[row_n], other_N[row_n], config) for rule, row_n in slices]
    clicks = int(label_N.sum())
    return Evidence(rows.source, len(label_N), clicks, assessed.estimates, comparison, tuple(checks))


def _scored(contenders: Sequence[Contender], tables: Sequence[pa.Table]) -> tuple[dict[str, ScoreN], dict[str, ScoreN]]:
    """Each contender's scores, and those before calibration, by which it ranks: a calibration may tie rows."""
    scores, rankings = {}, {}
    for contender, table in zip(contenders, tables, strict=True):
        scorer = contender.bundle.scorer
        ranking_N = scorer.uncalibrated(table)
        broken = int((~np.isfinite(ranking_N)).sum())
        if broken:
            raise Failure(f"{contender.uri} gives {broken:,} of {len(ranking_N):,} rows scores that are no numbers")
        rankings[contender.uri] = ranking_N
        scores[contender.uri] = scorer.calibration.apply(ranking_N)  # as score_encoded, without scoring twice
    return scores, rankings


def _of_dataset(contenders: Sequence[Contender], path: Path, split: str) -> _Encoded:
    dataset = PreparedDataset.open(path)
    for contender in contenders:
        dataset.require_pipeline(contender.bundle.pipeline.digest, contender.uri)
    table = dataset.split(split)
    train = dataset.files("train") if "train" in dataset.splits else None
    return _Encoded(
        [table] * len(contenders), f"{split} split of {path}", train, dataset.schema.missing_negatives(split)
    )


def _of_files(contenders: Sequence[Contender], given: Given) -> _Encoded:
    first, *others = (contender.bundle for contender in contenders)
    if others:
        found = list(same_rows_of_files(first, others[0], given.sources, given.max_bad_rows))
    else:
        found = [rows_of_files(first, given.sources, given.max_bad_rows)]
    return _Encoded([rows.table for rows in found], found[0].source, None, first.schema.missing_negatives("test"))
