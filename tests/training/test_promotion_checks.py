"""The gate's rules, on numbers alone."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from features.errors import InputError
from features.metrics import calibration, expected_calibration_error
from features.schema import Schema
from serving.calibration import UNCALIBRATED
from training.errors import Failure
from training.evaluation.comparison import assess, compare
from training.evaluation.results import Comparison, Difference
from training.promotion.checks import (
    by_chance,
    check_calibration,
    check_differences,
    check_rows,
    check_slice,
    failed,
)
from training.promotion.command import checks_table
from training.promotion.config import PromotionConfig, SliceRule, load_promotion_config
from training.promotion.trial import _scored

DEFAULT = PromotionConfig()
RULE = SliceRule(field="gender", value="F", max_logloss_increase=0.01)


def compared(logloss: tuple[float | None, float | None], auc: tuple[float | None, float | None]) -> Comparison:
    """Differences with these values and p."""
    found = {
        name: Difference(value, None if value is None else value - 0.1, value, p, "bootstrap", "not told apart")
        for name, (value, p) in {"logloss": logloss, "auc": auc}.items()
    }
    return Comparison("new", "old", found, "")


@pytest.mark.parametrize(
    ("logloss", "auc", "refused"),
    [
        ((0.02, 0.001), (0.01, 0.001), ["logloss"]),
        ((-0.02, 0.001), (-0.01, 0.001), ["auc"]),
        ((0.02, 0.001), (-0.01, 0.001), ["logloss", "auc"]),
        ((-0.02, 0.001), (0.01, 0.001), []),
        ((0.02, 0.06), (-0.01, 0.06), []),  # worse, as far as chance goes
        ((0.0, 1.0), (0.0, 1.0), []),  # the same model once more
        ((-0.02, 0.001), (None, None), ["auc"]),  # one class only: nothing is known
        ((-0.02, None), (0.0, None), []),  # few groups, and no test: the numbers decide
        ((0.001, None), (-0.001, None), ["logloss", "auc"]),
    ],
)
def test_significantly_worse_is_refused(
    logloss: tuple[float, float], auc: tuple[float, float], refused: list[str]
) -> None:
    checks = check_differences(compared(logloss, auc), DEFAULT)
    assert [check.name for check in failed(checks)] == refused


def test_the_level_decides() -> None:
    comparison = compared((0.02, 0.03), (0.0, 1.0))
    assert failed(check_differences(comparison, DEFAULT))
    assert not failed(check_differences(comparison, PromotionConfig(level=0.02)))


def test_a_refusal_names_rule_and_numbers() -> None:
    (check,) = failed(check_differences(compared((0.0213, 0.0004), (0.0, 1.0)), DEFAULT))
    assert str(check) == "logloss +0.0213 (−0.0787 to +0.0213), p <.001, allowed: not worse with p < 0.05"


def test_both_directions_by_the_statistics_themselves() -> None:
    """Scores that know the rate of each row, and the same with noise of two logits on top."""
    random = np.random.default_rng(0)
    rate_N = random.uniform(0.05, 0.95, 2000)
    label_N = (random.random(2000) < rate_N).astype(float)
    logit_N = np.log(rate_N / (1 - rate_N)) + random.normal(0, 2, 2000)
    noisy_N = 1 / (1 + np.exp(-logit_N))
    for group_N in (None, np.arange(2000) % 100):
        worse = compare(label_N, {"noisy": noisy_N, "known": rate_N}, group_N, replicates=200)
        better = compare(label_N, {"known": rate_N, "noisy": noisy_N}, group_N, replicates=200)
        assert [check.name for check in failed(check_differences(worse, DEFAULT))] == ["logloss", "auc"]
        assert not failed(check_differences(better, DEFAULT))


def test_calibration_against_thresholds() -> None:
    random = np.random.default_rng(1)
    score_N = random.uniform(0.1, 0.5, 100_000)
    label_N = (random.random(100_000) < score_N).astype(float)
    assert not failed(check_calibration(label_N, score_N, None, DEFAULT))
    ratio, ece = check_calibration(label_N, 1.2 * score_N, None, DEFAULT)
    assert ratio.value == pytest.approx(1.2 * score_N.sum() / label_N.sum())
    assert not ratio.passed  # 1.2 against 1.1
    assert ece.value == pytest.approx(0.2 * 0.3, abs=0.004)
    assert not ece.passed  # .06 against .05
    assert not failed(
        check_calibration(label_N, 1.2 * score_N, None, PromotionConfig(max_calibration_error=0.25, max_ece=0.07))
    )
    assert failed(check_calibration(label_N, 0.8 * score_N, None, DEFAULT))


@pytest.mark.parametrize("sized", [1, 10], ids=["independent rows", "groups that click alike"])
def test_few_rows_are_allowed_what_chance_does_to_them(sized: int) -> None:
    """Of calibrated scores some 5 % are beyond it, not nearly all; and what is far off is refused all the same."""
    random, rows = np.random.default_rng(2), 400
    score_N = random.uniform(0.05, 0.9, rows)
    group_N = np.arange(rows) // sized
    # rows of a group share half of what decides on a click, whose rate is the score for each row
    shared = np.where(random.random((300, rows)) < 0.5, random.random((300, rows // sized)).repeat(sized, 1), 2)
    drawn_N = np.where(shared < 2, shared, random.random((300, rows)))
    labels = (drawn_N < score_N).astype(float)
    allowed = np.array([by_chance(d, score_N, group_N) for d in labels])
    found = np.array(
        [(abs(float(calibration(d, score_N) or 0) - 1), expected_calibration_error(d, score_N)) for d in labels]
    )
    beyond = (found > allowed).mean(axis=0)
    assert (beyond < 0.12).all()
    assert (beyond > 0.01).all()
    assert allowed[:, 1].mean() == pytest.approx(np.quantile(found[:, 1], 0.95), rel=0.1)
    assert [c.passed for c in check_calibration(labels[0], score_N / 3, group_N, DEFAULT)] == [False, False]


@pytest.mark.parametrize("groups", [1, 2, 3, 7, 8, 50, None])
@pytest.mark.parametrize("factor", [0.5, 1.8])
def test_a_models_own_error_is_no_chance(groups: int | None, factor: float) -> None:
    """Every group has the same clicks and scores that are far off: they agree on it, so chance explains nothing."""
    score_N, label_N = np.tile([0.2, 0.4], 2000), np.tile([0, 0, 0, 0, 0, 0, 0, 1, 1, 1], 400).astype(float)
    group_N = None if groups is None else np.arange(4000) // 10 % groups
    assert [c.passed for c in check_calibration(label_N, score_N, group_N, DEFAULT)] == [True, True]
    checks = check_calibration(label_N, score_N * factor, group_N, DEFAULT)
    assert [(c.passed, c.rule) for c in checks] == [(False, "1 ± 0.1"), (False, "at most 0.05")]


def test_groups_that_are_too_few_leave_what_chance_does_to_rows() -> None:
    """Seven users who all click or never do, and one who is nearly all of the rows: neither tells of users' spread."""
    label_N, score_N = np.repeat([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0], 50), np.full(400, 0.5)
    few, one = np.arange(400) * 7 // 400, np.r_[np.zeros(392), np.arange(8) + 1]
    assert by_chance(label_N, score_N, few) == by_chance(label_N, score_N, one) == by_chance(label_N, score_N, None)
    eight = by_chance(label_N, score_N, np.arange(400) // 50)
    assert eight[0] > 3 * by_chance(label_N, score_N, None)[0]


def test_chance_is_forgiven_up_to_a_limit() -> None:
    """Of 20 rows with 2 clicks chance explains nearly every ratio."""
    label_N, score_N = np.repeat([0.0, 1.0], [18, 2]), np.full(20, 0.14)
    assert by_chance(label_N, score_N, None)[0] > 1
    (ratio, _), (loose, _) = (
        check_calibration(label_N, score_N, None, PromotionConfig(max_calibration_error=most)) for most in (0.1, 0.2)
    )
    assert (ratio.value, ratio.passed, loose.passed) == (pytest.approx(1.4), False, True)
    assert ratio.rule == "1 ± 0.3 (chance on so few rows, up to 3 × 0.1)"


def test_rows_that_lack_negatives_tell_nothing_of_calibration() -> None:
    label_N, score_N = np.repeat([0.0, 1.0], 500), np.full(1000, 0.1)
    assert len(failed(check_calibration(label_N, score_N, None, DEFAULT))) == 2
    checks = check_calibration(label_N, score_N, None, DEFAULT, "they are gone")
    assert [str(check) for check in checks] == [
        "calibration not judged: they are gone, allowed: 1 ± 0.1",
        "ece not judged: they are gone, allowed: at most 0.05",
    ]
    assert [(check.passed, check.value) for check in checks] == [(True, None)] * 2


@pytest.mark.parametrize(
    ("keys", "split", "told"),
    [
        ({}, "train", None),
        ({"already_sampled": {"rate": 0.2}}, "test", r"at a share of 0\.2 \(already_sampled\)"),
        ({"already_sampled": {"rate": 0.2}}, None, "already_sampled"),
        ({"already_sampled": {"rate": 1}}, None, None),
        ({"negative_sampling": {"rate": 0.1}}, "train", r"a share of 0\.1 of its negatives \(negative_sampling\)"),
        ({"negative_sampling": {"rate": 0.1}}, "test", None),  # it is of the training split alone
        ({"negative_sampling": {"rate": 0.1}}, None, None),
    ],
)
def test_which_rows_lack_negatives(keys: dict[str, Any], split: str | None, told: str | None) -> None:
    field = {"name": "a", "type": "categorical"}
    schema = Schema.model_validate({"name": "x", "label": {"column": "y"}, "fields": [field], **keys})
    lost = schema.missing_negatives(split)
    assert lost is None if told is None else re.search(told, str(lost))


def test_what_groups_share_is_chance_too() -> None:
    """Twenty users, each of whom clicks always or never: the mean of their clicks tells little of the model."""
    label_N = np.repeat([0.0, 1.0, 1.0, 1.0, 0.0] * 4, 50)
    score_N = np.full(1000, 0.5)
    single, grouped = (by_chance(label_N, score_N, group_N) for group_N in (None, np.arange(1000) // 50))
    # gaps of ± ½: a sum of N random signs has σ = √N / 2, and of 20 users with 50 rows σ = 50 √20 / 2; over 600 clicks
    assert single[0] == pytest.approx(1.96 * np.sqrt(1000) / 2 / 600, rel=0.1)
    assert grouped[0] == pytest.approx(1.96 * 50 * np.sqrt(20) / 2 / 600, rel=0.15)
    assert [c.passed for c in check_calibration(label_N, score_N, None, DEFAULT)] == [False, False]
    checks = check_calibration(label_N, score_N, np.arange(1000) // 50, DEFAULT)
    assert [(c.passed, c.threshold) for c in checks] == [(True, pytest.approx(0.3)), (True, pytest.approx(0.15))]


def test_no_click_is_no_calibration() -> None:
    ratio, ece = check_calibration(np.zeros(200), np.full(200, 0.001), None, DEFAULT)
    assert (ratio.passed, ratio.value, ece.passed) == (False, None, True)


def test_slices_against_their_own_threshold() -> None:
    label_N = np.array([0.0, 1.0] * 100)
    old_N, new_N = np.where(label_N > 0, 0.7, 0.3), np.where(label_N > 0, 0.69, 0.31)
    rise = log_loss(label_N, new_N) - log_loss(label_N, old_N)
    check = check_slice(RULE, label_N, new_N, old_N, DEFAULT)
    assert (check.name, check.value, check.passed) == ("gender = F", pytest.approx(rise, abs=1e-12), False)
    assert rise > 0.01
    wider = RULE.model_copy(update={"max_logloss_increase": 0.02})
    assert check_slice(wider, label_N, new_N, old_N, DEFAULT).passed
    assert check_slice(RULE, label_N, old_N, new_N, DEFAULT).passed
    few = check_slice(RULE, label_N[:99], new_N[:99], old_N[:99], DEFAULT)
    assert (few.passed, few.value, few.shown) == (True, None, "not judged: 99 rows")


def test_too_few_rows_judge_nothing() -> None:
    assert [check_rows(rows, DEFAULT).passed for rows in (99, 100)] == [False, True]


def test_a_table_shows_names_as_they_are() -> None:
    rule = SliceRule(field="[red]a[/]", value="x")
    check = check_slice(rule, np.zeros(1), np.zeros(1), np.zeros(1), DEFAULT)
    assert str(checks_table([check]).columns[0]._cells[0]) == "[red]a[/] = x"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("levle: 0.1", "levle: unknown key"),
        ("level: 2", "level: Input should be less than 1"),
        ("level: 0.001", "level 0.001 needs more replicates"),
        ("slices: [{field: a}]", "slices.0: give either value or is"),
        ("slices: [{field: a, value: x, is: cold}]", "slices.0: give either value or is"),
        ("slices: [{field: a, is: tepid}]", "slices.0.is: Input should be"),
        ("- 1", "must be a mapping"),
    ],
)
def test_a_wrong_configuration_is_one_line_that_names_the_key(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"promotion config {path}") as error:
        load_promotion_config(path)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_configuration_is_read(tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text("max_ece: 0.02\nslices:\n  - {field: user_id, is: cold, max_logloss_increase: 0.02}\n")
    found = load_promotion_config(path)
    assert (found.max_ece, found.level, found.slices[0].name) == (0.02, 0.05, "user_id is cold")
    assert load_promotion_config(None) == DEFAULT


def test_scores_that_are_no_numbers_end_the_trial() -> None:
    scorer = SimpleNamespace(uncalibrated=lambda _: np.array([0.5, np.nan, np.inf]), calibration=UNCALIBRATED)
    contender: Any = SimpleNamespace(uri="models:/x/1", bundle=SimpleNamespace(scorer=scorer))
    with pytest.raises(Failure, match=r"models:/x/1 gives 2 of 3 rows scores that are no numbers"):
        _scored([contender], [pa.table({})])


def test_auc_is_that_of_the_order_before_calibration() -> None:
    """A step of an isotonic calibration ties all rows; the model ranks them all the same."""
    random = np.random.default_rng(3)
    rate_N = random.uniform(0.1, 0.9, 1000)
    label_N = (random.random(1000) < rate_N).astype(float)
    scorer = SimpleNamespace(
        uncalibrated=lambda table: table["score"].to_numpy(),
        calibration=SimpleNamespace(apply=lambda score_N: np.full(len(score_N), label_N.mean())),
    )
    one, other = (SimpleNamespace(uri=f"models:/x/{n}", bundle=SimpleNamespace(scorer=scorer)) for n in (1, 2))
    tables = [pa.table({"score": rate_N}), pa.table({"score": 1 - rate_N})]
    contenders: Any = [one, other]
    scores, rankings = _scored(contenders, tables)
    assert np.ptp(scores["models:/x/1"]) == 0
    comparison = next(iter(assess(label_N, scores, rankings=rankings, replicates=100).comparisons.values()))
    area = roc_auc_score(label_N, rate_N)
    assert {check.name: check.value for check in check_differences(comparison, DEFAULT)} == {
        "logloss": 0.0,
        "auc": pytest.approx(2 * area - 1),
    }
