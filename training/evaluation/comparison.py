"""Models on the same rows: each metric with its interval, the differences, and a sentence that says what they mean.

AUC is tested by DeLong's test where rows are independent, all else by the bootstrap, and so is AUC where rows come in
groups, whose rows are not. With fewer than five clicks or five other rows no order is tested: draws of so few all say
the same.

Legend: N rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from features.metrics_delong import MIN_EACH
from training.evaluation.delong import delong_difference
from training.evaluation.intervals import REPLICATES, Draws, Resampling, differences_of, estimates_of
from training.evaluation.results import Comparison, Difference, Estimate
from training.evaluation.sums import RANKED, FloatN
from training.numbers import digits_of, signed

Progress = Callable[[int, int], None]
ORDERED = ("auc", "pr_auc", *RANKED)
_HEADLINES = {"logloss": "log loss", "auc": "AUC"}


@dataclass(frozen=True)
class Assessment:
    """Estimates of each scorer, and the first one's comparison with each other; R of the intervals, 0 without any."""

    estimates: dict[str, dict[str, Estimate]]
    comparisons: dict[str, Comparison]
    replicates: int


def assess(
    label_N: FloatN,
    scores: Mapping[str, FloatN],
    group_N: npt.ArrayLike | None = None,
    *,
    rankings: Mapping[str, FloatN] | None = None,
    metrics: Mapping[str, Mapping[str, float | None]] | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Assessment:
    """Measure each scorer on the same draws of rows, and compare the first with all others.

    Args:
        scores: probabilities, by scorer.
        group_N: of each row, None for a row without; None where no group is declared.
        rankings: what orders the rows, of scorers where that is not the probabilities: AUC and rankings go by it.
        metrics: `score_metrics` of the scorers, where they have been computed before.
        progress: told how many draws are done of how many, over all scorers.

    Raises:
        ValueError: there are no rows, a label is not 0 or 1, or a score is no probability.
    """
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, resampling.replicates * len(scores))

    resampling = Resampling(label_N, group_N, replicates=replicates, seed=seed, progress=advance)
    rankings = {**scores, **(rankings or {})}
    known = metrics or {}
    draws = {name: resampling.draws(score_N, rankings[name], known.get(name)) for name, score_N in scores.items()}
    first, *others = scores
    return Assessment(
        {name: estimates_of(drawn) for name, drawn in draws.items()},
        {name: _comparison(label_N, rankings, draws, group_N is not None, first, name) for name in others},
        resampling.replicates,
    )


def compare(
    label_N: FloatN,
    scores: Mapping[str, FloatN],
    group_N: npt.ArrayLike | None = None,
    *,
    rankings: Mapping[str, FloatN] | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """The first of two scorers against the second; ValueError unless there are two."""
    if len(scores) != 2:
        raise ValueError(f"two scorers are compared, not {len(scores)}: {', '.join(scores)}")
    assessed = assess(label_N, scores, group_N, rankings=rankings, replicates=replicates, seed=seed, progress=progress)
    return next(iter(assessed.comparisons.values()))


def _comparison(
    label_N: FloatN, rankings: Mapping[str, FloatN], draws: Mapping[str, Draws], grouped: bool, first: str, second: str
) -> Comparison:
    differences = differences_of(draws[first], draws[second])
    delong = delong_difference(label_N, rankings[first], rankings[second])
    clicks = int(np.sum(label_N))
    if min(clicks, len(label_N) - clicks) < MIN_EACH:
        differences |= {name: _untested(differences[name]) for name in ORDERED}
    elif not grouped and delong.p is not None:
        differences["auc"] = delong
    return Comparison(first, second, differences, sentence(first, second, differences), delong)


def _untested(found: Difference) -> Difference:
    return replace(found, low=None, high=None, p=None, verdict="not told apart")


def sentence(first: str, second: str, differences: Mapping[str, Difference]) -> str:
    """Whether the first is better, worse or not told apart in log loss and AUC, with the numbers."""
    found = {title: differences[name] for name, title in _HEADLINES.items() if differences[name].value is not None}
    told = {title: one for title, one in found.items() if one.verdict != "not told apart"}
    if not told:
        numbers = " and ".join(f"{title} {_numbers(one)}" for title, one in found.items())
        if all(one.p is None for one in found.values()):
            return f"{first} and {second} are not told apart: the groups, or rows, are too few to test. {numbers}."
        return f"{first} and {second} are not told apart by these rows: {numbers}."
    verdicts = list(dict.fromkeys(one.verdict for one in told.values()))
    parts = {
        verdict: " and ".join(f"{title} ({_numbers(one)})" for title, one in told.items() if one.verdict == verdict)
        for verdict in verdicts
    }
    words = f"{first} is {verdicts[0]} than {second} in {parts[verdicts[0]]}"
    words += "".join(f", but {verdict} in {parts[verdict]}" for verdict in verdicts[1:])
    rest = [f" In {title} they are not told apart ({_numbers(found[title])})." for title in found if title not in told]
    return f"{words}.{''.join(rest)}"


def _numbers(found: Difference) -> str:
    if found.low is None or found.high is None:
        return f"{signed(found.value)}, without an interval"
    digits = digits_of(found.low, found.high)
    return f"{signed(found.value, digits)}, 95 % {signed(found.low, digits)} to {signed(found.high, digits)}"
