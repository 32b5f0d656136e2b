"""Intervals and tests against resamples written out row by row, pairs counted one by one, and simulated truths."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from features.metrics import score_metrics
from training.evaluation import sums
from training.evaluation.clusters import clusters_of, drawn_weights
from training.evaluation.comparison import assess, compare, sentence
from training.evaluation.delong import delong_auc, delong_difference
from training.evaluation.intervals import Resampling, difference, interval, verdict
from training.evaluation.results import Difference, Estimate


def rows(count: int, seed: int = 0, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and the probabilities of someone who sees their log-odds through noise."""
    random = np.random.default_rng(seed)
    logit_N = random.normal(-1, 1, count)
    label_N = (random.random(count) < 1 / (1 + np.exp(-logit_N))).astype(np.float32)
    return label_N, probabilities(logit_N + noise * random.normal(size=count))


def probabilities(logit_N: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-logit_N))).astype(np.float32)


def simulated(seed: int, groups: int = 60, per_group: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, groups whose rows are alike, and two models' scores [2, N], each with its own errors about each group."""
    random = np.random.default_rng([5, seed])
    group_N = np.repeat(np.arange(groups), per_group)
    logit_N = random.normal(-0.5, 1, groups)[group_N] + random.normal(size=len(group_N))
    label_N = (random.random(len(group_N)) < 1 / (1 + np.exp(-logit_N))).astype(np.float32)
    taste_MG = 1.5 * random.normal(size=(2, groups))
    return label_N, probabilities(logit_N + taste_MG[:, group_N] + 0.3 * random.normal(size=(2, len(group_N)))), group_N


@pytest.mark.parametrize("decimals", [1, 7])
def test_draws_are_the_metrics_of_resampled_groups(decimals: int) -> None:
    label_N, score_N = rows(400)
    score_N = score_N.round(decimals)
    group_N = np.random.default_rng(1).integers(0, 30, 400)
    draws = Resampling(label_N, group_N, replicates=25, seed=3).draws(score_N)
    weight_RG, cluster_N = drawn_weights(30, 25, 3), clusters_of(group_N, 400)
    whole = score_metrics(label_N, score_N, group_N)
    assert {name: value_R[0] for name, value_R in draws.items()} == whole
    for r, weight_G in enumerate(weight_RG[1:], start=1):
        copies_N = weight_G[cluster_N].astype(int)
        drawn = np.repeat(np.arange(400), copies_N)
        copy = np.concatenate([np.arange(times) for times in copies_N])  # a group drawn twice is two groups
        expected = score_metrics(label_N[drawn], score_N[drawn], group_N[drawn] + 1000 * copy)
        found = {name: value_R[r] for name, value_R in draws.items()}
        assert found | {"ece": 0.0} == pytest.approx(expected | {"ece": 0.0}, abs=1e-12)


def test_spread_of_few_rows_is_not_too_small() -> None:
    """With as many drawn as there are, that of ten rows would be 5 % too small."""
    score_N = np.random.default_rng(11).random(10)
    logloss_R = Resampling(np.ones(10), replicates=20_000).draws(score_N)["logloss"]
    assert logloss_R[1:].std() == pytest.approx(np.log(score_N).std(ddof=1) / np.sqrt(10), rel=0.02)


def test_draws_of_binned_scores_spread_as_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    label_N, score_N = rows(3000)
    cluster_N, weight_RG = clusters_of(None, 3000), drawn_weights(3000, 60, 0)
    monkeypatch.setattr(sums, "_CELLS", 3000 * 400)  # 400 bins
    draws = Resampling(label_N, replicates=60).draws(score_N)
    for name, metric in (("auc", roc_auc_score), ("pr_auc", average_precision_score)):
        exact_R = np.array([metric(label_N, score_N, sample_weight=weight_G[cluster_N]) for weight_G in weight_RG])
        assert draws[name][0] == pytest.approx(exact_R[0], abs=1e-9)
        # 1,000 draws know the spread to 2 %
        assert draws[name].std() == pytest.approx(exact_R.std(), rel=0.01)
        assert np.corrcoef(draws[name], exact_R)[0, 1] > 0.998


def test_interval_of_calibration_error_is_free_of_what_noise_adds() -> None:
    """A perfectly calibrated scorer's ECE is above 0 by chance alone, and that of draws above that."""
    random = np.random.default_rng(2)
    score_N = random.random(4000)
    label_N = (random.random(4000) < score_N).astype(np.float32)
    resampling = Resampling(label_N, replicates=300)
    ece_R = resampling.draws(score_N)["ece"]
    found = resampling.estimates(score_N)["ece"]
    assert ece_R[1:].mean() > 1.2 * ece_R[0]
    assert found.low is not None
    assert found.low < 0.1 * found.value  # the truth is 0
    assert found.value == ece_R[0]
    assert found.high is not None
    assert ece_R[0] < found.high < np.quantile(ece_R[1:], 0.975)
    same = resampling.differences(score_N, 1 - (1 - score_N))["ece"]
    assert same.verdict == "not told apart"
    off = resampling.differences(score_N, score_N**2)["ece"]
    assert off.verdict == "better"
    assert off.low is not None
    assert off.high is not None
    assert off.low < off.value < off.high


def test_interval_leaves_out_zero_exactly_when_p_is_below_5_percent() -> None:
    random = np.random.default_rng(4)
    for above in range(15, 40):
        delta_R = np.append(0.5, np.where(np.arange(1000) < above, -1, 1) * random.random(1000))
        found = difference("auc", delta_R, np.zeros(1001))
        assert found.p == pytest.approx(2 * (above + 1) / 1001)
        assert found.low is not None
        assert (found.low > 0) == (found.p < 0.05) == (found.verdict == "better")


def test_undefined_draws_are_left_out_and_most_may_not_be() -> None:
    assert interval(np.array([np.nan, *np.arange(1.0, 40.0)])) == (1.0, 39.0)
    assert interval(np.array([np.nan, 1.0])) == (None, None)
    assert interval(np.empty(0)) == (None, None)


UP = ("auc", "pr_auc", "gauc", "ndcg@10", "mrr", "recall@10", "rig")
DOWN = ("logloss", "ne", "brier", "ece", "calibration")


@pytest.mark.parametrize("metric", UP + DOWN)
def test_each_metric_has_its_direction(metric: str) -> None:
    higher, lower = ("better", "worse") if metric in UP else ("worse", "better")
    assert (verdict(metric, 0.1, 0.01), verdict(metric, -0.1, 0.01)) == (higher, lower)
    assert verdict(metric, 0.1, 0.05) == verdict(metric, 0.1, None) == verdict(metric, None, None) == "not told apart"


def test_of_calibration_the_one_nearer_to_1_is_better() -> None:
    label_N = (np.random.default_rng(6).random(5000) < 0.4).astype(np.float32)
    right_N, high_N, low_N = (np.full(5000, score) for score in (0.4, 0.5, 0.2))
    for wrong_N in (high_N, low_N):
        found = Resampling(label_N, replicates=200).differences(right_N, wrong_N)["calibration"]
        own, other = (score_metrics(label_N, score_N)["calibration"] for score_N in (right_N, wrong_N))
        assert own is not None
        assert other is not None
        assert found.value == pytest.approx(abs(own - 1) - abs(other - 1))
        assert found.verdict == "better"


def naive_delong(label_N: np.ndarray, *scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUCs and their covariance from all pairs."""
    won = []
    for score_N in scores:
        clicks, others = score_N[label_N == 1], score_N[label_N == 0]
        won.append((clicks[:, None] > others) + 0.5 * (clicks[:, None] == others))
    of_clicks, of_others = (np.array([pairs.mean(axis=axis) for pairs in won]) for axis in (1, 0))
    spread = np.cov(of_clicks) / of_clicks.shape[1] + np.cov(of_others) / of_others.shape[1]
    return np.array([pairs.mean() for pairs in won]), np.atleast_2d(spread)


@pytest.mark.parametrize("decimals", [1, 2, 7])
def test_delong_is_that_of_all_pairs(decimals: int) -> None:
    label_N, score_N = rows(600)
    other_N = (0.7 * score_N + 0.3 * np.random.default_rng(7).random(600)).round(decimals)
    score_N = score_N.round(decimals)
    (auc, other), spread = naive_delong(label_N, score_N, other_N)
    found = delong_auc(label_N, score_N)
    half = norm.ppf(0.975) * np.sqrt(spread[0, 0])
    assert (found.value, found.low, found.high) == pytest.approx((auc, auc - half, auc + half), abs=1e-12)
    error = np.sqrt(spread[0, 0] + spread[1, 1] - 2 * spread[0, 1])
    told = delong_difference(label_N, score_N, other_N)
    assert told.value == pytest.approx(auc - other, abs=1e-12)
    assert told.p == pytest.approx(2 * norm.sf(abs(auc - other) / error), rel=1e-9)
    assert told.high == pytest.approx(auc - other + norm.ppf(0.975) * error, abs=1e-12)


def test_delong_without_spread() -> None:
    label_N, score_N = rows(50)
    same = delong_difference(label_N, score_N, score_N)
    assert same == Difference(0.0, 0.0, 0.0, 1.0, "DeLong", "not told apart")
    nothing = Difference(None, None, None, None, "DeLong", "not told apart")
    assert delong_difference(np.ones(50), score_N, score_N / 2) == nothing
    assert delong_auc(np.zeros(50), score_N) == Estimate(None)
    one_click = np.eye(1, 50)[0]
    assert delong_auc(one_click, score_N) == Estimate(pytest.approx(roc_auc_score(one_click, score_N)))
    perfect = delong_difference(label_N, label_N, np.full(50, 0.5))
    assert (perfect.value, perfect.p) == (0.5, None)
    told = compare(label_N, {"perfect": label_N, "constant": np.full(50, 0.5)}, replicates=200)
    assert told.differences["auc"].test == "bootstrap"  # which needs no spread
    assert told.differences["auc"].verdict == "better"


def test_assessment_is_the_same_for_a_seed_and_tells_how_far_it_is() -> None:
    label_N, score_N = rows(500)
    group_N = np.arange(500) // 5
    scores = {"a": score_N, "b": np.sqrt(score_N), "c": np.full(500, 0.3)}
    told: list[tuple[int, int]] = []
    found = assess(
        label_N, scores, group_N, replicates=250, seed=1, progress=lambda done, total: told.append((done, total))
    )
    assert found == assess(label_N, scores, group_N, replicates=250, seed=1)
    metrics = {name: score_metrics(label_N, score_N, group_N) for name, score_N in scores.items()}
    assert found == assess(label_N, scores, group_N, metrics=metrics, replicates=250, seed=1)
    assert found.comparisons["b"] == compare(label_N, {n: scores[n] for n in "ab"}, group_N, replicates=250, seed=1)
    assert found.estimates != assess(label_N, scores, group_N, replicates=250, seed=2).estimates
    assert told == [(done, 750) for done in (99, 199, 250, 349, 449, 500, 599, 699, 750)]
    assert list(found.comparisons) == ["b", "c"]
    for name, estimate in found.estimates["a"].items():
        assert estimate.value == score_metrics(label_N, score_N, group_N)[name]
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low <= estimate.value <= estimate.high


def test_delong_gives_the_verdict_unless_rows_come_in_groups() -> None:
    label_N, score_N = rows(400)
    scores = {"a": score_N, "b": np.sqrt(score_N).round(1)}
    alone, grouped = compare(label_N, scores), compare(label_N, scores, np.arange(400) // 4)
    assert alone.differences["auc"] == alone.delong == grouped.delong
    assert grouped.differences["auc"].test == "bootstrap"
    assert set(alone.differences) == set(score_metrics(label_N, score_N)) - {"coverage"}


def test_two_models_swapped_have_the_opposite_verdict() -> None:
    label_N, score_N = rows(4000, noise=0.3)
    worse_N = probabilities(np.log(score_N / (1 - score_N)) + 1.5 * np.random.default_rng(8).normal(size=4000))
    group_N = np.arange(4000) // 8
    better = compare(label_N, {"a": score_N, "b": worse_N}, group_N, replicates=300)
    worse = compare(label_N, {"b": worse_N, "a": score_N}, group_N, replicates=300)
    for name in ("auc", "pr_auc", "logloss", "ne", "rig", "brier", "gauc", "ndcg@10"):
        one, other = better.differences[name], worse.differences[name]
        assert (one.verdict, other.verdict) == ("better", "worse")
        assert (one.value, one.low, one.high, one.p) == pytest.approx((-other.value, -other.high, -other.low, other.p))


def told(value: float | None, verdict: str, half: float = 0.001) -> Difference:
    if value is None:
        return Difference(None, None, None, None, "bootstrap", "not told apart")
    return Difference(value, value - half, value + half, 0.5, "bootstrap", verdict)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("logloss", "auc", "words"),
    [
        (
            told(-0.004, "better"),
            told(0.0002, "not told apart"),
            "A is better than B in log loss (−0.0040, 95 % −0.0050 to −0.0030)."
            " In AUC they are not told apart (+0.0002, 95 % −0.0008 to +0.0012).",
        ),
        (
            told(-0.004, "better"),
            told(0.01, "better"),
            "A is better than B in log loss (−0.0040, 95 % −0.0050 to −0.0030)"
            " and AUC (+0.0100, 95 % +0.0090 to +0.0110).",
        ),
        (
            told(0.004, "worse"),
            told(0.01, "better"),
            "A is worse than B in log loss (+0.0040, 95 % +0.0030 to +0.0050),"
            " but better in AUC (+0.0100, 95 % +0.0090 to +0.0110).",
        ),
        (
            told(1e-5, "not told apart", half=3e-5),
            told(None, ""),
            "A and B are not told apart by these rows: log loss +0.000010, 95 % −0.000020 to +0.000040.",
        ),
    ],
)
def test_sentences(logloss: Difference, auc: Difference, words: str) -> None:
    assert sentence("A", "B", {"auc": auc, "logloss": logloss}) == words


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_only(label: float) -> None:
    score_N = np.random.default_rng(9).random(100)
    found = assess(np.full(100, label), {"a": score_N, "b": score_N / 2}, np.arange(100) // 4, replicates=50)
    undefined = {"auc", "pr_auc", "ne", "rig", "gauc"}
    if not label:
        undefined |= {"calibration", "ndcg@10", "mrr", "recall@10"}
    assert {name for name, one in found.estimates["a"].items() if one == Estimate(None)} == undefined
    assert {name for name, one in found.comparisons["b"].differences.items() if one.value is None} == undefined
    assert found.comparisons["b"].differences["logloss"].p is not None


@pytest.mark.parametrize("group", [None, np.zeros(1)])
def test_one_row_has_no_interval(group: np.ndarray | None) -> None:
    found = assess(np.ones(1), {"a": np.array([0.8]), "b": np.array([0.7])}, group)
    assert found.replicates == 0
    assert found.estimates["a"]["logloss"] == Estimate(pytest.approx(-np.log(0.8)))
    assert found.comparisons["b"].differences["logloss"].verdict == "not told apart"
    assert found.comparisons["b"].sentence == (
        "a and b are not told apart: the groups, or rows, are too few to test. log loss −0.1335, without an interval."
    )


def test_few_groups_are_not_tested() -> None:
    """By what they are worth of one size: seven are too few, eight are not, and so are nine of which one is half."""
    label_N, score_N = rows(560)
    scores = {"a": score_N, "b": 1 - score_N}
    for group_N, tested in (
        (np.arange(560) % 7, False),
        (np.arange(560) % 8, True),
        (np.where(np.arange(560) < 280, 0, 1 + np.arange(560) % 8), False),
    ):
        found = assess(label_N, scores, group_N, replicates=100)
        assert found.replicates == (100 if tested else 0)
        assert all((one.low is not None) == tested for one in found.estimates["a"].values())
        differences = found.comparisons["b"].differences
        assert all((one.p is not None) == tested for one in differences.values())
        assert differences["auc"].verdict == ("better" if tested else "not told apart")
        assert ("are too few to test" in found.comparisons["b"].sentence) != tested


def test_order_is_measured_by_what_orders() -> None:
    """Of scores with ties: areas, rankings and DeLong's test by what is without them, losses by the scores."""
    label_N, score_N = rows(600)
    group_N, step_N = np.arange(600) // 6, np.round(score_N, 1).clip(0.05, 0.95)
    for groups in (group_N, None):
        found = assess(label_N, {"a": step_N, "b": score_N / 2}, groups, rankings={"a": score_N}, replicates=100)
        fine = assess(label_N, {"a": score_N, "b": score_N / 2}, groups, replicates=100)
        coarse = assess(label_N, {"a": step_N, "b": score_N / 2}, groups, replicates=100)
        ordered = {"auc", "pr_auc", "gauc", "ndcg@10", "mrr", "recall@10", "coverage"}
        for name, one in found.estimates["a"].items():
            assert one == (fine if name in ordered else coarse).estimates["a"][name], name
        for name, told in found.comparisons["b"].differences.items():
            assert told == (fine if name in ordered else coarse).comparisons["b"].differences[name], name
        assert found.comparisons["b"].delong == fine.comparisons["b"].delong
        assert found.comparisons["b"].differences["auc"].value == 0
        assert coarse.comparisons["b"].differences["auc"].value != 0
        scores, rankings = {"a": step_N, "b": score_N / 2}, {"a": score_N}
        assert compare(label_N, scores, groups, rankings=rankings, replicates=100) == found.comparisons["b"]
        again = assess(label_N, scores, groups, rankings=rankings, replicates=100)
        assert again.estimates == found.estimates


@pytest.mark.parametrize("few", ["clicks", "others"])
@pytest.mark.parametrize("grouped", [False, True])
def test_order_of_few_clicks_or_others_is_not_tested(few: str, grouped: bool) -> None:
    """All draws have the same few, above which one scorer puts nothing and the other everything."""
    group_N = np.arange(100) if grouped else None
    for count, tested in ((4, False), (5, True)):
        one_N = np.arange(100) < count
        label_N = (one_N if few == "clicks" else ~one_N).astype(np.float32)
        noise_N = np.random.default_rng(3).random(100) / 10
        scores = {"right": 0.8 * label_N + noise_N, "wrong": 0.8 * (1 - label_N) + noise_N}
        found = compare(label_N, scores, group_N, replicates=200)
        auc = found.differences["auc"]
        assert (auc.p is not None, auc.low is not None) == (tested, tested)
        assert auc.verdict == ("better" if tested else "not told apart")
        assert found.differences["pr_auc"].verdict == auc.verdict
        assert found.differences["logloss"].verdict == "better"
    few_N = np.eye(4, 50).sum(axis=0)
    score_N = np.random.default_rng(4).random(50)
    assert delong_difference(few_N, score_N, few_N / 2).p is None
    assert delong_auc(few_N, score_N).low is None


def test_constant_scores_have_no_spread_in_auc() -> None:
    label_N, _ = rows(200)
    found = assess(label_N, {"a": np.full(200, 0.3)}, replicates=100)
    assert found.estimates["a"]["auc"] == Estimate(0.5, 0.5, 0.5)


def test_what_cannot_be_compared_is_refused() -> None:
    label_N, score_N = rows(10)
    with pytest.raises(ValueError, match="two scorers are compared, not 1: a"):
        compare(label_N, {"a": score_N})
    with pytest.raises(ValueError, match="no rows"):
        assess(np.empty(0), {"a": np.empty(0)})
    with pytest.raises(ValueError, match="row 0 has"):
        assess(label_N, {"a": score_N + 2})


@pytest.mark.long
def test_delong_finds_equal_models_unequal_in_5_percent() -> None:
    p = []
    for experiment in range(2000):
        random = np.random.default_rng([10, experiment])
        logit_N = random.normal(-1, 1, 300)
        label_N = random.random(300) < 1 / (1 + np.exp(-logit_N))
        one_N, other_N = (probabilities(logit_N + random.normal(size=300)) for _ in range(2))
        p.append(delong_difference(label_N, one_N, other_N).p)
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.015)  # three standard deviations
    assert np.mean(np.array(p) < 0.5) == pytest.approx(0.5, abs=0.035)


@pytest.mark.long
def test_among_groups_the_bootstrap_keeps_5_percent_and_delong_does_not() -> None:
    wrong: dict[str, list[bool]] = {"auc": [], "logloss": [], "pr_auc": [], "brier": [], "gauc": [], "DeLong": []}
    for experiment in range(400):
        label_N, score_MN, group_N = simulated(experiment)
        found = compare(label_N, dict(zip("ab", score_MN, strict=True)), group_N, replicates=400)
        assert found.delong is not None
        for name in wrong:
            one = found.delong if name == "DeLong" else found.differences[name]
            wrong[name].append(one.verdict != "not told apart")
    share = {name: float(np.mean(found)) for name, found in wrong.items()}
    assert share.pop("DeLong") > 0.15
    # three standard deviations of 400 experiments, and what sixty groups leave of a percentile interval's accuracy
    assert all(0.015 < found < 0.1 for found in share.values()), share


@pytest.mark.long
def test_intervals_hold_the_truth_in_95_percent() -> None:
    """The truth is what a hundred times as many rows say."""
    label_N, score_MN, group_N = (
        np.concatenate(parts, axis=-1) for parts in zip(*(simulated(9000 + n) for n in range(500)), strict=True)
    )
    group_N = np.arange(len(group_N)) // 20
    truth = score_metrics(label_N, score_MN[0], group_N)
    held: dict[str, list[bool]] = {name: [] for name in truth}
    for experiment in range(400):
        label_N, score_MN, group_N = simulated(experiment)
        for name, one in assess(label_N, {"a": score_MN[0]}, group_N, replicates=400).estimates["a"].items():
            assert one.low is not None
            assert one.high is not None
            held[name].append(one.low <= truth[name] <= one.high)
    share = {name: float(np.mean(found)) for name, found in held.items()}
    del share["coverage"]  # one or two groups of sixty
    assert share.pop("ece") > 0.9  # on the safe side
    assert all(0.9 < found < 0.985 for found in share.values()), share
