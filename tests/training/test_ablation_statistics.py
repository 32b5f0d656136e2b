"""Comparison statistics against definitions written out, recomputed resamples and simulations of a known truth."""

import numpy as np
import pytest
from scipy.stats import nct
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score

from features import metrics
from training.ablation.statistics import METRICS, Difference, Resampled, compare
from training.evaluation.clusters import clusters_of, holm

POINT = {
    "auc": metrics.auc,
    "logloss": metrics.logloss,
    "ne": metrics.normalized_entropy,
    "ece": metrics.expected_calibration_error,
}


def rows(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and the log-odds they were drawn with."""
    random = np.random.default_rng(seed)
    logit_N = random.normal(-1, 1, count)
    return (random.random(count) < sigmoid(logit_N)).astype(np.float32), logit_N


def sigmoid(logit_N: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-logit_N))).astype(np.float32)


def difference(
    label_N: np.ndarray, cluster_N: np.ndarray, base: dict, other: dict, metric: str = "logloss"
) -> Difference:
    found = compare(label_N, cluster_N, [("base", base), ("other", other)], baseline="base", replicates=100)
    told = found["other"].differences[metric]
    assert told is not None
    return told


@pytest.mark.parametrize("decimals", [1, 2, 7])
def test_estimates_are_the_metrics_of_the_whole_test_set(decimals: int) -> None:
    label_N, logit_N = rows(3000)
    noise = np.random.default_rng(1).normal(size=(2, 3000))
    scores = {s: np.round(sigmoid(logit_N + noise[s]), decimals) for s in (0, 1)}  # ties, and scores of 0 and 1
    found = compare(label_N, clusters_of(None, 3000, most=50), [("cell", scores)], baseline="cell", replicates=20)
    for name, metric in POINT.items():
        estimate = found["cell"].estimates[name]
        expected = {s: metric(label_N, score_N) for s, score_N in scores.items()}
        assert estimate is not None
        # the same sums in another order; scikit-learn's trapezoids lose more than they
        assert estimate.by_seed == pytest.approx(expected, abs=1e-10 if name == "auc" else 1e-12)
        assert estimate.mean == pytest.approx(np.mean(list(expected.values())), abs=1e-10)
        assert estimate.sd_seeds == pytest.approx(np.std(list(expected.values()), ddof=1), abs=1e-10)
        assert estimate.low < estimate.mean < estimate.high


def test_every_group_is_a_cluster_and_so_is_every_row_without_one() -> None:
    group_N = np.array(["u", None, "v", "u", None], dtype=object)
    assert clusters_of(group_N, 5).tolist() == [0, 2, 1, 0, 3]
    assert clusters_of(np.array([7.0, np.nan, 7.0]), 3).tolist() == [0, 1, 0]  # whole numbers with gaps, as Arrow gives
    assert sorted(clusters_of(None, 4).tolist()) == [0, 1, 2, 3]


def test_many_groups_are_spread_evenly_over_random_clusters_and_stay_whole() -> None:
    group_N = np.random.default_rng(0).integers(0, 1000, 20_000)
    cluster_N = clusters_of(group_N, 20_000, most=100, seed=3)
    pairs = np.unique(np.stack([group_N, cluster_N]), axis=1)
    assert pairs.shape[1] == 1000
    assert np.bincount(pairs[1]).tolist() == [10] * 100
    assert np.bincount(clusters_of(None, 1000, most=100)).tolist() == [10] * 100
    assert (clusters_of(group_N, 20_000, most=100, seed=4) != cluster_N).any()


def test_replicates_are_the_metrics_of_resampled_clusters() -> None:
    label_N, logit_N = rows(600)
    score_N = np.round(sigmoid(logit_N + np.random.default_rng(1).normal(size=600)), 2)
    cluster_N = clusters_of(np.random.default_rng(2).integers(0, 40, 600), 600)
    resampled = Resampled.of(label_N, cluster_N, 100, seed=5)
    _, logloss_R, ne_R, ece_R = resampled.metrics(score_N)
    edges = np.unique(np.quantile(score_N.astype(np.float64), np.arange(1, 20) / 20, method="lower"))
    bin_N = np.searchsorted(edges, score_N, side="right")
    assert len(resampled.weight_RG) == 101
    for r, weight_G in enumerate(resampled.weight_RG):
        drawn = np.repeat(np.arange(600), weight_G[cluster_N].astype(int))
        label, score = label_N[drawn], score_N[drawn]
        gaps = [abs((score.astype(np.float64) - label)[bin_N[drawn] == b].sum()) for b in range(20)]
        assert logloss_R[r] == pytest.approx(metrics.logloss(label, score), abs=1e-12)  # the same sums, reordered
        assert ne_R[r] == pytest.approx(metrics.normalized_entropy(label, score), abs=1e-12)
        assert ece_R[r] == pytest.approx(sum(gaps) / len(drawn), abs=1e-12)


@pytest.mark.parametrize("groups", [None, 100])
def test_spread_of_auc_is_that_of_recomputed_auc(groups: int | None) -> None:
    label_N, logit_N = rows(2000)
    score_N = np.round(sigmoid(logit_N + np.random.default_rng(1).normal(size=2000)), 2)
    group_N = None if groups is None else np.argsort(np.argsort(logit_N)) * groups // 2000  # alike within groups
    cluster_N = clusters_of(group_N, 2000)
    resampled = Resampled.of(label_N, cluster_N, 400, seed=6)
    linear_R = resampled.metrics(score_N)[0, 1:]
    whole_R = np.array([roc_auc_score(label_N, score_N, sample_weight=w[cluster_N]) for w in resampled.weight_RG[1:]])
    # the same draws: only the quadratic remainder of AUC differs, of the order of 1/√clusters of the spread
    assert linear_R.std() == pytest.approx(whole_R.std(), rel=0.03 if groups is None else 0.1)
    assert np.corrcoef(linear_R, whole_R)[0, 1] > (0.999 if groups is None else 0.98)


def test_standard_error_of_auc_is_delongs() -> None:
    label_N, logit_N = rows(1500)
    score_N = np.round(sigmoid(logit_N), 2)
    clicks, others = score_N[label_N == 1], score_N[label_N == 0]
    pairs = (clicks[:, None] > others) + 0.5 * (clicks[:, None] == others)
    delong = pairs.mean(axis=1).var(ddof=1) / len(clicks) + pairs.mean(axis=0).var(ddof=1) / len(others)
    auc_R = Resampled.of(label_N, clusters_of(None, 1500), 2000, seed=7).metrics(score_N)[0, 1:]
    assert auc_R.std() == pytest.approx(np.sqrt(delong), rel=0.05)  # 2000 draws give a deviation to 1.6 %


def test_standard_error_counts_seeds_rows_and_pairs_once() -> None:
    """Rows of one class whose loss is chosen, loss = 5 + seed + row + pair, so that the mean's variance is known."""
    random, seeds, count, experiments = np.random.default_rng(8), 4, 100, 300
    label_N, cluster_N = np.ones(count), np.arange(count)
    base = dict.fromkeys(range(seeds), np.full(count, np.exp(-5.0)))
    found = []
    for _ in range(experiments):
        loss_SN = 5 + 0.05 * random.normal(size=(seeds, 1)) + 0.7 * random.normal(size=count)
        loss_SN = loss_SN + random.normal(size=(seeds, count))
        found.append(difference(label_N, cluster_N, base, dict(enumerate(np.exp(-loss_SN)))).se ** 2)
    known = 0.05**2 / seeds + 0.7**2 / count + 1 / (seeds * count)
    # three seeds' worth of freedom and 300 experiments give the mean to 2 %; pairs counted twice would add 31 %
    assert np.mean(found) == pytest.approx(known, rel=0.09)


@pytest.mark.parametrize(
    ("of_seeds", "of_rows", "of_pairs"), [(0.2, 0, 0), (0, 0.5, 0), (0, 0, 0.5), (0.1, 0.3, 0.3)], ids=str
)
def test_cells_alike_are_told_apart_as_often_as_p_says(of_seeds: float, of_rows: float, of_pairs: float) -> None:
    """Two cells drawn alike, with noise of each run, of each row and of each run's row in the log-odds."""
    p = []
    for experiment in range(200):
        random = np.random.default_rng([9, experiment])
        label_N, logit_N = rows(800, seed=1000 + experiment)
        cells = []
        for _ in range(2):
            cell_N = logit_N + 0.5 + of_rows * random.normal(size=800)  # away from the least loss, a shift is felt
            shift_S = of_seeds * random.normal(size=4)
            cells.append({s: sigmoid(cell_N + shift_S[s] + of_pairs * random.normal(size=800)) for s in range(4)})
        p.append(difference(label_N, clusters_of(None, 800, most=100), *cells).p)
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.09  # .05 ± two standard deviations of 200 experiments, and 1 %


def test_a_planted_difference_is_found() -> None:
    label_N, logit_N = rows(5000)
    random = np.random.default_rng(10)

    def cell(noise: float) -> dict[int, np.ndarray]:
        return {s: sigmoid(logit_N + noise * random.normal(size=5000)) for s in range(3)}

    cells = {"base": cell(0.7), "good": cell(0.1), "bad": cell(1.5), "same": cell(0.7)}
    found = compare(label_N, clusters_of(None, 5000, most=1000), cells.items(), baseline="base", replicates=300)
    for metric, sign in (("auc", 1), ("logloss", -1), ("ne", -1)):
        good, bad, same = (found[name].differences[metric] for name in ("good", "bad", "same"))
        assert good is not None
        assert bad is not None
        assert same is not None
        assert (good.verdict, bad.verdict, same.verdict) == ("better", "worse", "not told apart")
        assert good.mean * sign > 0 > bad.mean * sign
        assert (good.low > 0) == (good.high > 0)
        assert same.low < 0 < same.high
        assert good.p <= good.p_holm <= 3 * good.p
    assert found["base"].differences == dict.fromkeys(METRICS)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_detectable_difference_is_seen_with_the_promised_power() -> None:
    label_N, logit_N = rows(400)
    random = np.random.default_rng(11)
    cells = {name: {0: sigmoid(logit_N + random.normal(size=400))} for name in "abcd"}
    found = compare(label_N, clusters_of(None, 400, most=30), cells.items(), baseline="a", replicates=200)
    told = found["b"].differences["auc"]
    assert told is not None
    limit = student.ppf(1 - 0.05 / 3 / 2, 29)  # one seed: 30 clusters alone give the freedom; three comparisons
    # the sum of two quantiles is the usual approximation of the noncentral t's 80 %
    assert nct.sf(limit, 29, told.detectable / told.se) == pytest.approx(0.8, abs=0.01)


def test_missing_seeds_pair_on_the_common_ones() -> None:
    label_N, logit_N = rows(300)
    random = np.random.default_rng(12)
    base, other = ({s: sigmoid(logit_N + random.normal(size=300)) for s in range(4)} for _ in range(2))
    cluster_N = clusters_of(None, 300, most=100)
    part = difference(label_N, cluster_N, {s: base[s] for s in (0, 1, 3)}, {s: other[s] for s in (3, 2, 1)})
    assert part == difference(label_N, cluster_N, {s: base[s] for s in (1, 3)}, {s: other[s] for s in (1, 3)})
    expected = [metrics.logloss(label_N, other[s]) - metrics.logloss(label_N, base[s]) for s in (1, 3)]
    assert part.mean == pytest.approx(np.mean(expected), abs=1e-12)


def test_cells_without_common_or_finished_seeds() -> None:
    label_N, logit_N = rows(300)
    score_N = sigmoid(logit_N)
    cells: list[tuple[str, dict[int, np.ndarray]]] = [("base", {0: score_N}), ("failed", {}), ("apart", {1: score_N})]
    found = compare(label_N, clusters_of(None, 300), cells, baseline="base", replicates=50)
    assert found["failed"].estimates == found["failed"].differences == dict.fromkeys(METRICS)
    assert found["apart"].estimates["auc"] is not None
    assert found["apart"].differences == dict.fromkeys(METRICS)
    for message, baseline in (("is not a cell", "none"), ("no finished seed", "failed")):
        with pytest.raises(ValueError, match=message):
            compare(label_N, clusters_of(None, 300), cells, baseline=baseline, replicates=50)


@pytest.mark.parametrize("seeds", [1, 3])
def test_identical_scores_are_not_told_apart(seeds: int) -> None:
    label_N, logit_N = rows(300)
    cell = {s: sigmoid(logit_N + s) for s in range(seeds)}
    told = difference(label_N, clusters_of(None, 300), cell, cell)
    assert told == Difference(
        0.0, 0.0, 0.0, se=0.0, p=1.0, p_holm=1.0, detectable=0.0, seeds=seeds, verdict="not told apart"
    )


def test_a_single_seed_has_the_error_of_the_test_rows_alone() -> None:
    count = 2000
    random = np.random.default_rng(13)
    base_N, other_N = np.exp(-1 - random.random((2, count)))
    told = difference(np.ones(count), np.arange(count), {0: base_N}, {0: other_N})
    loss_N = np.log(base_N) - np.log(other_N)
    assert told.se == pytest.approx(loss_N.std(ddof=1) / np.sqrt(count), rel=0.2)  # 100 draws give it to 7 %
    found = compare(np.ones(count), np.arange(count), [("base", {0: base_N})], baseline="base", replicates=50)
    estimate = found["base"].estimates["logloss"]
    assert estimate is not None
    assert estimate.sd_seeds is None
    assert estimate.low < estimate.mean < estimate.high


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_only(label: float) -> None:
    score_N = np.random.default_rng(14).random(100)
    cells = [("base", {0: score_N}), ("other", {0: score_N / 2})]
    found = compare(np.full(100, label), clusters_of(None, 100), cells, baseline="base", replicates=50)
    for statistics in (found["base"].estimates, found["other"].estimates, found["other"].differences):
        assert {name for name, value in statistics.items() if value is None} == {"auc", "ne"}


def test_draws_that_lack_a_class_are_left_out() -> None:
    label_N, score_N = np.array([1.0, 0, 0, 0]), np.array([0.6, 0.7, 0.2, 0.3])
    resampled = Resampled.of(label_N, np.arange(4), 200, seed=15)
    assert 0 < resampled.weight_RG.shape[0] - 1 < 200
    assert np.isfinite(resampled.metrics(score_N)).all()


def test_what_cannot_be_compared_is_refused() -> None:
    label_N, score_N = np.array([1.0, 0]), np.array([0.5, np.nan])
    with pytest.raises(ValueError, match="fewer than two clusters"):
        compare(label_N, np.zeros(2, int), [("base", {0: label_N})], baseline="base")
    with pytest.raises(ValueError, match="not finite"):
        compare(label_N, np.arange(2), [("base", {0: score_N})], baseline="base")


def test_one_seed_tells_nothing_apart() -> None:
    """However large the difference: what another seed would change is not known."""
    label_N, logit_N = rows(2000)
    better, worse = {0: sigmoid(logit_N)}, {0: sigmoid(-logit_N)}
    told = difference(label_N, clusters_of(None, 2000), worse, better)
    assert (told.seeds, told.verdict) == (1, "not told apart")
    assert told.p_holm < 1e-6
