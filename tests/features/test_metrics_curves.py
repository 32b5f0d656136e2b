"""Areas under curves against scikit-learn, and the bounds of binned ones against the exact ones."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from features import metrics
from features.metrics_curves import Counts, count_scores, ordinals, precision_recall_area, roc_area

RANDOM = np.random.default_rng(17)
NUMBERS = st.one_of(
    st.sampled_from([-1.0, -0.0, 0.0, 1e-40, 1.0, 3e38]), st.floats(allow_nan=False, allow_infinity=False, width=32)
)


@settings(max_examples=200)
@given(values=st.lists(NUMBERS, min_size=1, max_size=20), single=st.booleans())
def test_ordinals_are_in_the_order_of_the_numbers(values: list[float], single: bool) -> None:
    score_N = np.array(values, np.float32 if single else np.float64)
    place_N = ordinals(score_N).astype(np.int64)
    assert (np.sign(place_N[:, None] - place_N) == np.sign(score_N[:, None].astype(np.float64) - score_N)).all()


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_any_numbers_are_ranked(kind: type) -> None:
    label_N = (RANDOM.random(3000) < 0.3).astype(np.float32)
    score_N = (RANDOM.normal(size=3000) + label_N).round(1).astype(kind)
    assert metrics.auc(label_N, score_N) == pytest.approx(roc_auc_score(label_N, score_N), abs=1e-12)
    assert metrics.pr_auc(label_N, score_N) == pytest.approx(average_precision_score(label_N, score_N), abs=1e-12)


def drawn(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores whose bins are of that shape."""
    label_N = (RANDOM.random(4000) < 0.2).astype(np.float32)
    score_N = {
        "spread": lambda: RANDOM.random(4000),
        "few values": lambda: RANDOM.integers(0, 4, 4000) / 4,
        "crowded": lambda: 0.5 + 1e-9 * RANDOM.random(4000),  # equal as fp32
        "close to 1": lambda: 1 - 1e-6 * RANDOM.random(4000),
        "with 0": lambda: np.where(RANDOM.random(4000) < 0.5, 0, RANDOM.random(4000) ** 8),
        "constant": lambda: np.full(4000, 0.3),
    }[shape]()
    return label_N, np.clip(score_N, 0, 1)


@pytest.mark.parametrize("shape", ["spread", "few values", "crowded", "close to 1", "with 0", "constant"])
@pytest.mark.parametrize("bits", [3, 8, 22])
def test_exact_areas_lie_within_the_bounds_of_binned_ones(
    shape: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("features.metrics_curves._BINS", bits)
    label_N, score_N = drawn(shape)
    areas = zip(metrics.areas(label_N, score_N, exact_rows=100), metrics.areas(label_N, score_N), strict=True)
    for binned, exact in areas:
        assert exact.bound == 0.0
        assert binned.value is not None
        assert exact.value is not None
        assert abs(binned.value - exact.value) <= binned.bound + 1e-15


def test_the_bound_is_small_where_bins_are_fine() -> None:
    label_N = (RANDOM.random(200_000) < 0.2).astype(np.float32)
    score_N = np.clip(RANDOM.random(200_000) * 0.9 + 0.1 * label_N, 0, 1).astype(np.float32)
    roc, precision_recall = metrics.areas(label_N, score_N, exact_rows=1000)
    assert 0 < roc.bound < 5e-6
    assert 0 < precision_recall.bound < 2e-5
    assert roc.value == pytest.approx(roc_auc_score(label_N, score_N), abs=roc.bound)


def test_bounds_are_reached_by_the_worst_orders_within_a_bin() -> None:
    """One bin of 2 clicks and 3 others: any order of them has an AUC between 0 and 1."""
    counts = Counts(np.array([2]), np.array([3]), exact=False)
    assert (roc_area(counts).value, roc_area(counts).bound) == (0.5, 0.5)
    found = precision_recall_area(counts)
    assert found.value == 2 / 5
    assert found.value + found.bound == 1.0  # both clicks first
    worst = (1 / 4 + 2 / 5) / 2  # both clicks last
    assert found.value - found.bound <= worst


def test_large_counts_are_exact() -> None:
    """Whole numbers of pairs beyond what fp64 holds."""
    clicks_K, others_K = np.array([100_000_000, 3]), np.array([900_000_001, 2])
    pairs = (clicks_K.sum() * others_K.sum()).item()
    won = 100_000_000 * 900_000_001 + 2 * 3 * 900_000_001 + 2 * 3  # twice: ties are half
    assert roc_area(Counts(clicks_K, others_K)).value == float(Fraction(won, 2 * pairs))


def test_minus_zero_is_zero() -> None:
    label_N = np.array([1.0, 0.0])
    for kind in (np.float32, np.float64):
        score_N = np.array([-0.0, 0.0], kind)
        assert metrics.auc(label_N, score_N) == 0.5
        assert len(count_scores(label_N > 0, score_N).clicks_K) == 1
