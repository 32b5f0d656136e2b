"""Metrics against scikit-learn, and against definitions written out row by row."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

from features import metrics, metrics_curves, metrics_groups

RANDOM = np.random.default_rng(7)
LABEL = (RANDOM.random(500) < 0.3).astype(np.float32)
SCORE = np.round(np.clip(RANDOM.random(500) * 0.6 + 0.2 * LABEL, 0, 1), 2)  # rounded, so that there are ties
GROUP = RANDOM.integers(0, 60, 500)


def test_against_scikit_learn() -> None:
    assert metrics.logloss(LABEL, SCORE) == pytest.approx(log_loss(LABEL, SCORE), abs=1e-12)
    assert metrics.brier(LABEL, SCORE) == pytest.approx(brier_score_loss(LABEL, SCORE), abs=1e-12)
    weight = RANDOM.random(500)
    expected = log_loss(LABEL, SCORE, sample_weight=weight)
    assert metrics.logloss(LABEL, SCORE, weight) == pytest.approx(expected, abs=1e-12)


def test_auc_is_the_share_of_pairs_in_order() -> None:
    clicks, others = SCORE[LABEL == 1], SCORE[LABEL == 0]
    pairs = [(a > b) + 0.5 * (a == b) for a in clicks for b in others]
    assert metrics.auc(LABEL, SCORE) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_auc_standard_error_is_the_spread_over_samples() -> None:
    samples = []
    for _ in range(400):
        label = np.repeat([1.0, 0.0], [80, 120])
        samples.append(metrics.auc(label, RANDOM.exponential(1 + label)))
    mean = float(np.mean(samples))
    # exponential scores are the formula's own model; 400 samples give their standard deviation to 3.5 %
    assert metrics.auc_standard_error(mean, 80, 120) == pytest.approx(float(np.std(samples)), rel=0.12)


def test_grouped_auc_is_the_weighted_mean_of_the_groups() -> None:
    total, rows = 0.0, 0
    for group in np.unique(GROUP):
        mask = group == GROUP
        if LABEL[mask].min() != LABEL[mask].max():
            total += mask.sum() * roc_auc_score(LABEL[mask], SCORE[mask])
            rows += mask.sum()
    assert 0 < rows < 500
    assert metrics.grouped_auc(LABEL, SCORE, GROUP) == pytest.approx(total / rows, abs=1e-12)


def test_rows_without_a_group_are_left_out_of_grouped_auc() -> None:
    label, score = np.array([1.0, 0, 1, 0]), np.array([0.9, 0.1, 0.2, 0.8])
    group = np.array(["u", "u", None, None], dtype=object)
    assert metrics.grouped_auc(label, score, group) == 1.0


def test_normalized_entropy_and_calibration_by_hand() -> None:
    label, score = np.array([1.0, 0, 0, 1]), np.array([0.8, 0.4, 0.2, 0.6])
    own = -(math.log(0.8) + math.log(0.6) + math.log(0.8) + math.log(0.6)) / 4
    assert metrics.normalized_entropy(label, score) == pytest.approx(own / math.log(2))
    assert metrics.calibration(label, score) == pytest.approx(1.0)
    assert metrics.calibration(label, score / 2) == pytest.approx(0.5)


def test_calibration_error_by_hand() -> None:
    score = np.repeat([0.1, 0.5, 0.9], 100)
    label = np.concatenate([np.arange(100) < 20, np.arange(100) < 50, np.arange(100) < 60]).astype(float)
    assert metrics.expected_calibration_error(label, score) == pytest.approx((0.1 + 0.0 + 0.3) / 3)


def test_a_perfectly_calibrated_scorer_has_almost_no_calibration_error() -> None:
    score = RANDOM.random(200_000)
    label = (RANDOM.random(200_000) < score).astype(float)
    # 20 bins of 10,000 rows: the standard error of a bin's rate is at most .005
    assert metrics.expected_calibration_error(label, score) < 0.01


ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.one_of(st.sampled_from([0.0, 0.25, 1.0]), st.floats(0, 1, width=32))), min_size=1
)


@settings(max_examples=150)
@given(rows=ROWS, single=st.booleans())
def test_any_rows_have_scikit_learns_metrics(rows: list[tuple[int, float]], single: bool) -> None:
    """Few rows, ties, constant scores, one class, scores of 0 and 1, fp32 and fp64."""
    label_N = np.array([float(label) for label, _ in rows])
    score_N = np.array([score for _, score in rows], np.float32 if single else np.float64)
    found = metrics.score_metrics(label_N, score_N)
    near = float(np.finfo(score_N.dtype).eps)  # scikit-learn would clip fp32 by itself, but sums fp32 as fp32
    clipped_N = np.clip(score_N.astype(np.float64), near, 1 - near)
    own = log_loss(label_N, clipped_N, labels=[0, 1])
    assert found["logloss"] == pytest.approx(own, abs=1e-9)
    assert found["brier"] == pytest.approx(brier_score_loss(label_N, score_N.astype(np.float64), pos_label=1), abs=1e-9)
    if label_N.min() == label_N.max():
        assert found["auc"] is found["pr_auc"] is found["ne"] is found["rig"] is None
    else:
        assert found["auc"] == pytest.approx(roc_auc_score(label_N, score_N), abs=1e-9)
        assert found["pr_auc"] == pytest.approx(average_precision_score(label_N, score_N), abs=1e-9)
        base = log_loss(label_N, np.full(len(label_N), label_N.mean()))
        assert found["ne"] == pytest.approx(own / base, rel=1e-9)
        assert found["rig"] == pytest.approx(1 - own / base, abs=1e-9 * own / base)


def test_whole_metrics_are_those_alone() -> None:
    found = metrics.score_metrics(LABEL, SCORE, GROUP)
    alone = {
        "auc": metrics.auc(LABEL, SCORE),
        "pr_auc": metrics.pr_auc(LABEL, SCORE),
        "logloss": metrics.logloss(LABEL, SCORE),
        "ne": metrics.normalized_entropy(LABEL, SCORE),
        "brier": metrics.brier(LABEL, SCORE),
        "calibration": metrics.calibration(LABEL, SCORE),
        "ece": metrics.expected_calibration_error(LABEL, SCORE),
        "gauc": metrics.grouped_auc(LABEL, SCORE, GROUP),
        "rig": metrics.relative_information_gain(LABEL, SCORE),
    }
    assert found == alone | {key: found[key] for key in ("ndcg@10", "mrr", "recall@10", "coverage")}


def test_rows_in_parts_are_summed_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = metrics.score_metrics(LABEL, SCORE, GROUP)
    for module in (metrics, metrics_curves, metrics_groups):
        monkeypatch.setattr(module, "CHUNK", 7)
    assert metrics.score_metrics(LABEL, SCORE, GROUP) == pytest.approx(whole, abs=1e-12)
    weight = RANDOM.random(500)
    assert metrics.logloss(LABEL, SCORE, weight) == pytest.approx(log_loss(LABEL, SCORE, sample_weight=weight))


@pytest.mark.parametrize("label", [np.zeros(5), np.ones(5)])
def test_one_class_only(label: np.ndarray) -> None:
    score = np.linspace(0.1, 0.9, 5)
    found = metrics.score_metrics(label, score, np.arange(5))
    undefined = {"auc", "pr_auc", "ne", "gauc", "rig"}
    if label.max() == 0:
        undefined |= {"calibration", "ndcg@10", "mrr", "recall@10"}
    assert {name for name, value in found.items() if value is None} == undefined


def test_scores_of_zero_and_one_stay_finite() -> None:
    label_N, score_N = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert metrics.logloss(label_N, score_N) == pytest.approx(52 * math.log(2))
    single_N = score_N.astype(np.float32)  # fp32 knows a score no better than to 2^-23
    assert metrics.logloss(label_N, single_N) == pytest.approx(23 * math.log(2))
    assert metrics.logloss(label_N, single_N) == pytest.approx(log_loss(label_N, single_N), rel=1e-6)


def test_constant_scores_and_one_row() -> None:
    assert metrics.auc(LABEL, np.full(500, 0.5)) == 0.5
    assert metrics.score_metrics(np.array([1.0]), np.array([0.25]))["logloss"] == pytest.approx(math.log(4))


def test_without_rows_there_is_no_metric() -> None:
    none = np.empty(0)
    for metric in (metrics.auc, metrics.pr_auc, metrics.normalized_entropy, metrics.calibration):
        assert metric(none, none) is None
    for metric in (metrics.logloss, metrics.brier, metrics.expected_calibration_error, metrics.score_metrics):
        with pytest.raises(ValueError, match="no rows"):
            metric(none, none)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, -0.001, 1.001])
def test_scores_that_are_no_probabilities_are_refused_with_their_row(wrong: float) -> None:
    score_N = np.array([0.5, 0.5, wrong, 0.5, wrong], np.float32)
    with pytest.raises(ValueError, match=r"row 2 has .*a score is .* \(2 of 5 rows are not\)"):
        metrics.score_metrics(np.array([1.0, 0, 1, 0, 1]), score_N)
    for metric in (metrics.logloss, metrics.brier, metrics.calibration, metrics.expected_calibration_error):
        with pytest.raises(ValueError, match=r"row 2 has .*: a score is a probability, from 0 to 1"):
            metric(np.array([1.0, 0, 1, 0, 1]), score_N)


@pytest.mark.parametrize("wrong", [np.nan, 0.5, 2.0, -1.0])
def test_labels_other_than_0_and_1_are_refused_with_their_row(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"row 1 has .*: a label is 0 or 1 \(1 of 2 rows are not\)"):
        metrics.score_metrics(np.array([1.0, wrong]), np.array([0.5, 0.5]))


def test_as_many_scores_as_labels() -> None:
    with pytest.raises(ValueError, match="one of each per row"):
        metrics.logloss(np.ones(3), np.array([0.5]))


def test_order_is_measured_by_what_orders() -> None:
    step = np.round(SCORE, 1).clip(0.05, 0.95)
    found = metrics.score_metrics(LABEL, step, GROUP, SCORE)
    fine, coarse = metrics.score_metrics(LABEL, SCORE, GROUP), metrics.score_metrics(LABEL, step, GROUP)
    for name, value in found.items():
        ordered = name in ("auc", "pr_auc", "gauc", "ndcg@10", "mrr", "recall@10", "coverage")
        assert value == (fine if ordered else coarse)[name], name
    assert found["auc"] == pytest.approx(roc_auc_score(LABEL, SCORE), abs=1e-12)
    assert found["logloss"] == pytest.approx(log_loss(LABEL, step), abs=1e-12)
    assert fine["gauc"] != coarse["gauc"]


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.bool_])
def test_whole_numbers_are_scores_too(dtype: type) -> None:
    label, score = np.array([1.0, 0, 1, 0]), np.array([1, 0, 0, 0]).astype(dtype)
    assert metrics.logloss(label, score) == pytest.approx(log_loss(label, score.astype(np.float64)), abs=1e-12)
    assert metrics.brier(label, score) == 0.25


def test_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="the weights of all 500 rows are 0"):
        metrics.logloss(LABEL, SCORE, np.zeros(500))
