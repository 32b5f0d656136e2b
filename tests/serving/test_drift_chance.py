"""What chance leaves of a stability index, against simulations of rows that have not drifted, and of some that have."""

import numpy as np
import numpy.typing as npt
import pytest

from serving.monitoring.chance import PARTS, Shift, shift_of
from serving.monitoring.drift import ALARM

GROUPS, TRAINED = 23, 20_000
SHARES = 1 / np.arange(1, GROUPS + 1) ** 1.2
SHARES /= SHARES.sum()
DRAWS = 150

Ints = npt.NDArray[np.int64]


def counted(cluster_N: Ints, group_N: Ints) -> Ints:
    """Rows by random part of their users, and group."""
    found = np.zeros((PARTS, GROUPS), np.int64)
    np.add.at(found, (cluster_N * 7919 % PARTS, group_N), 1)
    return found


def shifts(rows: int, of_a_user: int, same_for_a_user: bool, shares: npt.NDArray[np.float64] = SHARES) -> list[Shift]:
    """Shifts of rows drawn from `shares`, of users with so many rows each, alike or not, from training rows."""
    random, found = np.random.default_rng(rows + of_a_user), []
    user_N = np.arange(rows) // of_a_user
    for _ in range(DRAWS):
        drawn = random.choice(GROUPS, rows // of_a_user if same_for_a_user else rows, p=shares)
        found.append(
            shift_of(random.multinomial(TRAINED, SHARES), counted(user_N, drawn[user_N] if same_for_a_user else drawn))
        )
    return found


def alarms(found: list[Shift], threshold: float = 0.2) -> float:
    return float(np.mean([one.beyond_chance > threshold and one.p < ALARM for one in found]))


def test_independent_rows_leave_what_is_known() -> None:
    """(G − 1) · (1 / n + 1 / m), to which the index's mean comes, and p is uniform."""
    for rows in (500, 5000):
        found = shifts(rows, 1, False)
        expected = (GROUPS - 1) * (1 / rows + 1 / TRAINED)
        assert np.mean([one.chance for one in found]) == pytest.approx(expected, rel=0.05)
        assert np.mean([one.psi for one in found]) == pytest.approx(expected, rel=0.1)
        assert 0.01 <= np.mean([one.p < 0.05 for one in found]) <= 0.12
        assert alarms(found) == 0.0


@pytest.mark.parametrize(("rows", "of_a_user"), [(2000, 100), (5000, 100), (20_000, 100)])
def test_fields_of_few_users_raise_no_alarm(rows: int, of_a_user: int) -> None:
    """All rows of a user have one value: 2,000 rows of 20 users are worth 20."""
    found = shifts(rows, of_a_user, True)
    naive = (GROUPS - 1) * (1 / rows + 1 / TRAINED)
    assert np.mean([one.psi for one in found]) > 10 * naive  # what rows taken as independent would call drift
    assert np.mean([one.psi for one in found]) < 1.2 * np.mean([one.chance for one in found])
    assert np.mean([one.p < 0.05 for one in found]) < 0.1
    assert alarms(found) == 0.0


def test_drift_is_found_in_few_rows() -> None:
    moved = SHARES.copy()
    moved[1], moved[0] = moved[1] + 0.3, moved[0] - 0.3
    index = float(((moved - SHARES) * np.log(moved / SHARES)).sum())
    assert index > 0.4
    found = shifts(500, 1, False, moved)
    assert np.mean([one.beyond_chance for one in found]) == pytest.approx(index, rel=0.1)
    assert alarms(found) > 0.99
    assert alarms(shifts(20_000, 100, True, moved)) > 0.9
    assert alarms(found, threshold=5.0) == 0.0


def test_values_that_training_had_not_are_told() -> None:
    expected = np.array([0, 0, 5000, 5000, 0])
    found = np.zeros((PARTS, 5), np.int64)
    found[:, 2:4] = 1
    same = shift_of(expected, found)
    assert same.psi == pytest.approx(0.0, abs=0.01)
    found[:, 1] = 1
    new = shift_of(expected, found)
    p, q = (expected + 0.5) / (expected + 0.5).sum(), (found.sum(0) + 0.5) / (found.sum(0) + 0.5).sum()
    assert new.psi == pytest.approx(float(((q - p) * np.log(q / p)).sum()), rel=1e-9)
    assert new.p < 1e-6
