"""Slices of real rows against the raw rows they were made of, and what two models' differences on them are worth."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_1samp
from sklearn.metrics import log_loss, roc_auc_score

from features.dataset import GROUP, LABEL, LINE, TIME, PreparedDataset
from features.files import read_json
from serving.bundle import Bundle
from training.evaluation.names import known_values
from training.evaluation.paired import mean_difference
from training.evaluation.results import Slice
from training.evaluation.slices import slices, worse

SIZES = {"min_rows": 20, "min_each": 3}
RANGE = re.compile(r"(?:(?P<low>[\d.]+) ≤ )?(?P<field>\w+)(?: < (?P<high>[\d.]+))?(?: ≥ (?P<least>[\d.]+))?")


def raw_of(raw_rows: Path, table: pa.Table) -> pl.DataFrame:
    """The raw rows of encoded ones, in their order."""
    return pl.read_parquet(raw_rows)[table[LINE].to_numpy() - 1]


@pytest.fixture(scope="module")
def test_rows(dataset: PreparedDataset) -> pa.Table:
    return dataset.split("test")


@pytest.fixture(scope="module")
def found(bundle: Bundle, dataset: PreparedDataset, test_rows: pa.Table) -> list[Slice]:
    """Of the model, and of one that is no better than its mean."""
    label_N = test_rows[LABEL].to_numpy()
    score_N = bundle.scorer.score_encoded(test_rows)
    scores = {"model": score_N, "flat": np.full_like(score_N, score_N.mean())}
    known = known_values(read_json(dataset.path / "profile.json", "profile"))
    train = dataset.files("train")
    return slices(bundle, test_rows, label_N, scores, pair=("flat", "model"), train=train, known=known, **SIZES)


def is_in(part: Slice, raw: pl.DataFrame, of_training: dict[str, Counter[str]]) -> np.ndarray:
    """Which raw rows a slice speaks of, by its name."""
    if part.kind == "value" and " = " in part.name:
        value = part.name.removeprefix(f"{part.field} = ")
        cells = raw[part.field].cast(pl.String).fill_null("")
        return np.array([value in cell.split() if part.field == "genres" else value == cell for cell in cells])
    if part.kind == "value":
        bounds = RANGE.fullmatch(part.name)
        assert bounds is not None
        assert bounds["field"] == part.field
        number_N = raw[part.field].cast(pl.Float64).to_numpy()
        low, high = bounds["low"] or bounds["least"] or "-inf", bounds["high"] or "inf"
        return (number_N >= float(low)) & (number_N < float(high))
    value_N = raw[part.field].cast(pl.String).fill_null("").to_numpy()
    counts = of_training[part.field]
    if part.kind == "missing":
        return value_N == ""
    band = re.match(rf"{part.field}: (cold|warm|head) ", part.name)
    assert band is not None, part
    least = {"user_id": 2, "item_id": 10, "title": 1}[part.field]
    known = {value: count for value, count in counts.items() if count >= least}
    head: set[str] = set()
    for value in sorted(known, key=lambda value: (-known[value], value)):
        if sum(known[other] for other in head) >= sum(known.values()) / 2:
            break
        head.add(value)
    bands = {"head": head, "warm": known.keys() - head, "cold": set(value_N) - known.keys()}
    return np.isin(value_N, list(bands[band[1]]))


def test_slices_are_what_their_names_say_and_have_their_rows_metrics(
    found: list[Slice], bundle: Bundle, dataset: PreparedDataset, test_rows: pa.Table, raw_rows: Path
) -> None:
    raw, train = raw_of(raw_rows, test_rows), raw_of(raw_rows, dataset.split("train"))
    of_training = {name: Counter(train[name].cast(pl.String)) for name in ("user_id", "item_id", "title")}
    label_N = (raw["rating"] >= 4).to_numpy().astype(int)
    score_N = bundle.scorer.score_encoded(test_rows).astype(np.float64)
    seen = set()
    for part in found:
        if part.kind == "time" or part.field == "title":  # titles are hashed: those that share a bucket are one
            continue
        in_N = is_in(part, raw, of_training)
        label, score = label_N[in_N], score_N[in_N]
        assert (part.rows, part.clicks) == (in_N.sum(), label.sum()), part.name
        assert SIZES["min_rows"] <= part.rows < len(label_N)
        assert min(part.clicks, part.rows - part.clicks) >= SIZES["min_each"]
        metrics = part.metrics["model"]
        assert metrics["auc"] == pytest.approx(roc_auc_score(label, score), abs=1e-12)
        assert metrics["logloss"] == pytest.approx(log_loss(label, score), abs=1e-9)
        assert metrics["calibration"] == pytest.approx(score.sum() / label.sum(), abs=1e-9)
        assert part.metrics["flat"]["auc"] == 0.5
        seen.add((part.field, part.kind))
    assert {("gender", "value"), ("age", "value"), ("genres", "value"), ("user_id", "activity")} <= seen
    assert {("item_id", "activity"), ("year", "value"), ("occupation", "value")} <= seen


def test_the_most_frequent_values_are_shown(found: list[Slice], test_rows: pa.Table, raw_rows: Path) -> None:
    raw = raw_of(raw_rows, test_rows)
    genres = Counter(genre for cell in raw["genres"].fill_null("") for genre in set(cell.split()))
    shown = [part for part in found if part.field == "genres" and part.kind == "value"]
    assert len(shown) == 10
    assert [part.rows for part in shown] == sorted((genres[p.name.partition(" = ")[2]] for p in shown), reverse=True)
    assert min(part.rows for part in shown) >= max(
        count for genre, count in genres.items() if f"genres = {genre}" not in {p.name for p in shown}
    )


def test_small_slices_and_all_rows_are_left_out(bundle: Bundle, test_rows: pa.Table, raw_rows: Path) -> None:
    men = test_rows.filter(pa.array((raw_of(raw_rows, test_rows)["gender"] == "M").to_numpy()))
    work = raw_of(raw_rows, men)["occupation"]
    label_N = (work == Counter(work).most_common(1)[0][0]).to_numpy().astype(np.float32)  # all or none of a slice

    def found(**sizes: int) -> dict[str, tuple[int, int]]:
        parts = slices(bundle, men, label_N, {"m": np.full(len(label_N), 0.5)}, **sizes)
        return {part.name: (part.rows, part.clicks) for part in parts}

    every = found(min_rows=1, min_each=0)
    assert "gender = M" not in every
    assert max(rows for rows, _ in every.values()) < len(label_N)
    expected = {n: (rows, clicks) for n, (rows, clicks) in every.items() if rows >= 40 and 12 <= clicks <= rows - 12}
    assert found(min_rows=40, min_each=12) == expected
    assert any(rows >= 40 and clicks < 12 for rows, clicks in every.values())
    assert any(rows >= 40 and clicks > rows - 12 for rows, clicks in every.values())


def test_hashed_values_are_named_by_the_profile(bundle: Bundle, dataset: PreparedDataset, raw_rows: Path) -> None:
    table = dataset.split("train")
    titles = Counter(raw_of(raw_rows, table)["title"])
    known = known_values(read_json(dataset.path / "profile.json", "profile"))
    label_N = table[LABEL].to_numpy()
    found = slices(bundle, table, label_N, {"m": np.full(len(label_N), 0.5)}, known=known, min_rows=1, min_each=1)
    shown = {p.name.partition(" = ")[2]: p.rows for p in found if p.field == "title" and p.kind == "value"}
    assert len(shown) == 10
    assert set(known["title"]) >= {name for names in shown for name in names.split(" or ")}
    assert all(rows >= titles[title] for title, rows in shown.items())
    assert sum(titles[title] == rows for title, rows in shown.items()) > 5  # few of a thousand share a bucket of 10,000


def test_times_are_cut_into_quarters_or_days(bundle: Bundle, test_rows: pa.Table) -> None:
    def cut(second_N: np.ndarray) -> list[tuple[str, int]]:
        place = test_rows.column_names.index(TIME)
        table = test_rows.set_column(place, TIME, pa.array(second_N.astype(np.float64)))
        label_N, score_N = test_rows[LABEL].to_numpy(), np.full(table.num_rows, 0.5)
        parts = slices(bundle, table, label_N, {"m": score_N}, **SIZES)
        return [(part.name, part.rows) for part in parts if part.kind == "time"]

    rows = test_rows.num_rows
    day = 1_714_521_600  # 2024-05-01
    two = cut(np.where(np.arange(rows) < 0.4 * rows, day + 86_399.0, day + 86_400.0))
    assert two == [("2024-05-01", int(0.4 * rows)), ("2024-05-02", rows - int(0.4 * rows))]
    quarters = cut(day + 60.0 * np.arange(rows) * 40)
    assert [count for _, count in quarters] == [rows // 4] * 4
    assert quarters[0][0] == "2024-05-01 00:00 to 2024-05-05 03:20 UTC"
    assert cut(np.full(rows, float(day))) == []


def test_without_the_training_split_there_are_no_bands(bundle: Bundle, test_rows: pa.Table) -> None:
    label_N = test_rows[LABEL].to_numpy()
    found = slices(bundle, test_rows, label_N, {"m": np.full(len(label_N), 0.5)}, **SIZES)
    assert {part.kind for part in found} == {"value", "unknown", "time"}
    assert all(part.logloss is None and part.verdict is None and part.p_corrected is None for part in found)
    assert worse(found) == []


def test_the_never_seen_are_told_once_where_they_are_the_cold(found: list[Slice]) -> None:
    users = [part.kind for part in found if part.field == "user_id"]
    assert "activity" in users
    assert "unknown" not in users


def holm_by_hand(p: dict[str, float]) -> dict[str, float]:
    corrected, largest = {}, 0.0
    for rank, (name, value) in enumerate(sorted(p.items(), key=lambda pair: pair[1])):
        largest = max(largest, min(1.0, (len(p) - rank) * value))
        corrected[name] = largest
    return corrected


def test_a_model_that_is_worse_on_one_genre_is_caught_there(
    bundle: Bundle, dataset: PreparedDataset, raw_rows: Path
) -> None:
    table = dataset.split("train")
    label_N = table[LABEL].to_numpy()
    good_N = bundle.scorer.score_encoded(table)
    horror_N = np.array(["Horror" in cell.split() for cell in raw_of(raw_rows, table)["genres"].fill_null("")])
    bad_N = np.where(horror_N, 1 - good_N, good_N)
    scores = {"bad": bad_N, "good": good_N}
    found = slices(bundle, table, label_N, scores, pair=("bad", "good"), top=30, train=dataset.files("train"))
    (horror,) = (part for part in found if part.name == "genres = Horror")
    assert worse(found)[0] == horror
    assert horror.logloss is not None
    delta = log_loss(label_N[horror_N], bad_N[horror_N]) - log_loss(label_N[horror_N], good_N[horror_N])
    assert horror.logloss.value == pytest.approx(delta, abs=1e-6)
    assert horror.logloss.low is not None
    assert 0 < horror.logloss.low < delta
    p = {part.name: part.logloss.p for part in found if part.logloss is not None and part.logloss.p is not None}
    expected = holm_by_hand(p)
    for part in found:
        assert part.p_corrected == (pytest.approx(expected[part.name], rel=1e-12) if part.name in p else None)
        if part.p_corrected is None:
            assert part.verdict is None
        else:
            assert (part.verdict != "not told apart") == (part.p_corrected < 0.05)
    assert {part.verdict for part in found} >= {None, "worse", "not told apart"}
    turned = slices(bundle, table, label_N, scores, pair=("good", "bad"), top=30, train=dataset.files("train"))
    assert [part.name for part in turned if part.verdict == "better"] == [
        part.name for part in found if part.verdict == "worse"
    ]
    assert worse(turned) == []


def test_equal_scores_are_never_told_apart(bundle: Bundle, test_rows: pa.Table) -> None:
    label_N, score_N = test_rows[LABEL].to_numpy(), bundle.scorer.score_encoded(test_rows)
    found = slices(bundle, test_rows, label_N, {"a": score_N, "b": score_N.copy()}, pair=("a", "b"), **SIZES)
    assert {(part.verdict, part.p_corrected) for part in found} == {("not told apart", 1.0), (None, None)}
    untested = [part for part in found if part.verdict is None]
    assert all(part.logloss is not None and part.logloss.p is None for part in untested)


def test_order_is_measured_by_what_orders(bundle: Bundle, test_rows: pa.Table) -> None:
    """A calibration by steps ties what the scores before it tell apart."""
    label_N, score_N = test_rows[LABEL].to_numpy(), bundle.scorer.score_encoded(test_rows)
    step_N = np.round(score_N, 1).clip(0.05, 0.95)
    found = slices(bundle, test_rows, label_N, {"m": step_N}, rankings={"m": score_N}, **SIZES)
    fine = slices(bundle, test_rows, label_N, {"m": score_N}, **SIZES)
    coarse = slices(bundle, test_rows, label_N, {"m": step_N}, **SIZES)
    values = [[[part.metrics["m"][key] for part in parts] for key in ("auc", "logloss")]
              for parts in (found, fine, coarse)]  # fmt: skip
    assert values[0] == [values[1][0], values[2][1]]
    assert values[1][0] != values[2][0]


def test_differences_over_clusters_of_one_size_are_students() -> None:
    random = np.random.default_rng(1)
    mean_G = random.normal(0.1, 1, 40)
    mean_G = np.concatenate([mean_G, 0.5 - mean_G])  # symmetric, so that nothing is skewed
    delta_P = (mean_G[:, None] + np.array([-2.0, 0.5, 1.5])).ravel()
    found = mean_difference(delta_P, np.repeat(np.arange(80), 3))
    test = ttest_1samp(mean_G, 0.0)
    assert (found.value, found.p) == (pytest.approx(0.25, abs=1e-12), pytest.approx(test.pvalue, rel=1e-9))
    interval = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert mean_difference(delta_P + 1, np.repeat(np.arange(80), 3)).verdict == "worse"
    assert mean_difference(delta_P - 1, np.repeat(np.arange(80), 3)).verdict == "better"


def test_skewed_differences_need_more_evidence_and_few_clusters_give_none() -> None:
    delta_P = np.append(np.full(95, 0.03), np.full(5, -0.3))  # rare clicks, on which the first is better
    cluster_P = np.arange(100)
    found, plain = mean_difference(delta_P, cluster_P), ttest_1samp(delta_P, 0.0)
    # Hall's transformation, written out
    skew = np.mean((delta_P - delta_P.mean()) ** 3) / np.std(delta_P) ** 3
    s = delta_P.mean() / np.std(delta_P, ddof=1)
    hall = 10 * (s + skew * s**2 / 3 + skew**2 * s**3 / 27 + skew / 600)
    assert found.p == pytest.approx(2 * student.sf(abs(hall), 99), rel=1e-9)
    assert found.p is not None
    assert found.p > plain.pvalue
    for few_P in (
        cluster_P // 25,
        np.where(cluster_P < 10, cluster_P, 10),
    ):  # four, and eleven of which one is nearly all
        one = mean_difference(delta_P, few_P)
        assert (one.low, one.p, one.verdict) == (None, None, "not told apart")
    assert mean_difference(delta_P, cluster_P // 20).p is not None


@pytest.mark.long
@pytest.mark.parametrize("spread", [0.0, 1.2])
def test_false_alarms_are_as_rare_as_p_says(spread: float) -> None:
    """Two models of equal expected loss: in clusters of unequal size, and with rare clicks."""
    random = np.random.default_rng(2)
    p = []
    for _ in range(8000):
        share_G = np.exp(random.normal(0, spread, 20))
        cluster_P = random.choice(20, 500, p=share_G / share_G.sum())
        delta_P = random.normal(0, 1, 20)[cluster_P] + random.normal(0, 2, 500)
        p.append(mean_difference(delta_P, cluster_P).p)
    level = np.array([1.0 if value is None else value for value in p])
    assert 0.03 < (level < 0.05).mean() < 0.065
    assert (level < 0.001).mean() < 0.0025
    skewed = []
    for _ in range(8000):
        click_P = random.random(1000) < 0.02
        delta_P = np.where(click_P, -0.49, 0.01)  # expectation: 0
        skewed.append(mean_difference(delta_P, np.arange(1000)).p or 1.0)
    assert (np.array(skewed) < 0.001).mean() < 0.0025


def test_a_difference_of_one_user_is_none_of_the_models(bundle: Bundle, test_rows: pa.Table) -> None:
    label_N, user_N = test_rows[LABEL].to_numpy(), test_rows[GROUP].to_numpy()
    ((loudest, _),) = Counter(user_N.tolist()).most_common(1)
    even_N = np.full(len(label_N), 0.5)
    wrong_N = np.where(user_N == loudest, np.where(label_N > 0, 0.2, 0.8), 0.5)
    scores = {"wrong": wrong_N, "even": even_N}
    assert worse(slices(bundle, test_rows, label_N, scores, pair=("wrong", "even"), **SIZES)) == []
    everyone = pa.array([str(row) for row in range(len(label_N))])  # the same rows, had each a user of its own
    apart = test_rows.set_column(test_rows.column_names.index(GROUP), GROUP, everyone)
    assert worse(slices(bundle, apart, label_N, scores, pair=("wrong", "even"), **SIZES)) != []
