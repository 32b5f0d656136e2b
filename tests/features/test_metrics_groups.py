"""Metrics of rankings against scikit-learn, and against means over every order that equal scores can take."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score

from features import metrics

RANDOM = np.random.default_rng(23)
Row = tuple[int, int, float]  # group, label, score
ROWS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.5, 1.0])), min_size=1, max_size=20
).filter(lambda rows: max(sum(row[0] == g for row in rows) for g in range(4)) <= 6)


def over_all_orders(rows: list[Row], top: int) -> dict[str, float]:
    """Means over all orders of a group's rows that are in the order of the scores."""
    orders = [
        [label for _, label, _ in order]
        for order in permutations(rows)
        if all(above[2] >= below[2] for above, below in pairwise(order))
    ]
    discount = 1 / np.log2(np.arange(2, top + 2))
    ideal = discount[: sum(label for _, label, _ in rows)].sum()
    return {
        "ndcg": float(np.mean([np.dot(order[:top], discount[: len(order)]) / ideal for order in orders])),
        "mrr": float(np.mean([1 / (order.index(1) + 1) for order in orders])),
        "recall": float(np.mean([sum(order[:top]) / sum(order) for order in orders])),
    }


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, top=st.integers(1, 4), single=st.booleans())
def test_rankings_are_means_over_all_orders_of_equal_scores(rows: list[Row], top: int, single: bool) -> None:
    group_N, label_N, score_N = (np.array(column, float) for column in zip(*rows, strict=True))
    found = metrics.rankings(label_N, score_N.astype(np.float32) if single else score_N, group_N, top)
    for place, group in enumerate(dict.fromkeys(row[0] for row in rows)):
        mine = [row for row in rows if row[0] == group]
        labels = [label for _, label, _ in mine]
        assert (found.rows_G[place], found.clicks_G[place]) == (len(mine), sum(labels))
        ours = {"ndcg": found.ndcg_G[place], "mrr": found.reciprocal_G[place], "recall": found.recall_G[place]}
        if not sum(labels):
            assert np.isnan(list(ours.values())).all()
        else:
            assert ours == pytest.approx(over_all_orders(mine, top), abs=1e-12)
        if 0 < sum(labels) < len(labels):
            expected = roc_auc_score(labels, [score for *_, score in mine])
            assert found.auc_G[place] == pytest.approx(expected, abs=1e-12)
        else:
            assert np.isnan(found.auc_G[place])


@pytest.mark.parametrize("decimals", [1, 2, 9])
def test_against_scikit_learn_in_large_groups(decimals: int) -> None:
    label_N = (RANDOM.random(5000) < 0.1).astype(np.float32)
    score_N = (RANDOM.random(5000) * 0.8 + 0.2 * label_N).round(decimals)
    group_N = RANDOM.integers(0, 40, 5000)
    ndcg, gauc, rows = [], [], []
    for group in range(40):
        label, score = label_N[group_N == group], score_N[group_N == group]
        ndcg.append(ndcg_score([label], [score], k=10))
        gauc.append(roc_auc_score(label, score))
        rows.append(len(label))
    found = metrics.score_metrics(label_N, score_N, group_N)
    assert found["ndcg@10"] == pytest.approx(np.mean(ndcg), abs=1e-9)
    assert found["gauc"] == pytest.approx(np.average(gauc, weights=rows), abs=1e-9)


def test_constant_scores_are_worth_a_random_order() -> None:
    """3 clicks in 1,000 rows: 1 % of them are among the first ten, and the first one is where random orders have it."""
    label_N = np.zeros(1000)
    label_N[:3] = 1
    found = metrics.rankings(label_N, np.full(1000, 0.4), np.zeros(1000))
    assert found.recall_G[0] == pytest.approx(0.01, abs=1e-12)
    assert found.auc_G[0] == 0.5
    orders = np.sort(np.argsort(RANDOM.random((20_000, 1000)), axis=1)[:, :3], axis=1)[:, 0]
    simulated = 1 / (orders + 1)
    assert found.reciprocal_G[0] == pytest.approx(simulated.mean(), abs=4 * simulated.std() / np.sqrt(20_000))


def test_the_first_click_among_very_many_equal_scores() -> None:
    """One click among t equal rows is anywhere alike: the mean of 1 / rank is the t-th harmonic number over t."""
    label_N = np.zeros(200_000)
    label_N[7] = 1
    found = metrics.rankings(label_N, np.full(200_000, 0.4), np.zeros(200_000))
    assert found.reciprocal_G[0] == pytest.approx((1 / np.arange(1, 200_001)).sum() / 200_000, rel=1e-9)


def test_coverage_is_the_share_of_rows_in_groups_with_both_classes() -> None:
    group_N = np.array(["both", "both", "clicks", "none", "none", None], dtype=object)
    found = metrics.score_metrics(np.array([1.0, 0, 1, 0, 0, 1]), np.full(6, 0.5), group_N)
    assert found["coverage"] == 2 / 6
    assert found["ndcg@10"] == pytest.approx((np.mean([1, 1 / np.log2(3)]) + 1) / 2)  # of "both" and "clicks"


@pytest.mark.parametrize("groups", [np.array([None] * 3, dtype=object), np.full(3, np.nan)])
def test_rows_of_no_group_have_no_rankings(groups: np.ndarray) -> None:
    found = metrics.score_metrics(np.array([1.0, 0, 1]), np.array([0.5, 0.2, 0.1]), groups)
    assert [found[name] for name in ("gauc", "ndcg@10", "mrr", "recall@10")] == [None] * 4
    assert found["coverage"] == 0.0
    assert metrics.score_metrics(np.array([1.0, 0, 1]), np.array([0.5, 0.2, 0.1]))["coverage"] is None


def test_order_of_rows_does_not_count() -> None:
    label_N = (RANDOM.random(300) < 0.2).astype(np.float32)
    score_N, group_N = RANDOM.integers(0, 5, 300) / 5, RANDOM.integers(0, 20, 300)
    order = RANDOM.permutation(300)
    one = metrics.score_metrics(label_N, score_N, group_N)
    assert metrics.score_metrics(label_N[order], score_N[order], group_N[order]) == pytest.approx(one, abs=1e-12)
