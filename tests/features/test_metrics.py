"""Metrics against scikit-learn, and against definitions written out row by row."""

import math

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from features import metrics

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


@pytest.mark.parametrize("label", [np.zeros(5), np.ones(5)])
def test_one_class_only(label: np.ndarray) -> None:
    score = np.linspace(0.1, 0.9, 5)
    found = metrics.score_metrics(label, score, np.arange(5))
    undefined = {"auc", "pr_auc", "ne", "gauc"} | ({"calibration"} if label.max() == 0 else set())
    assert {name for name, value in found.items() if value is None} == undefined


def test_scores_of_zero_and_one_stay_finite() -> None:
    assert metrics.logloss(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(52 * math.log(2))


def test_constant_scores_and_one_row() -> None:
    assert metrics.auc(LABEL, np.full(500, 0.5)) == 0.5
    assert metrics.score_metrics(np.array([1.0]), np.array([0.25]))["logloss"] == pytest.approx(math.log(4))
